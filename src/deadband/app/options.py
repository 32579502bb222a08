"""The arguments and options of the command line's commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, or a name on the hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Data = Annotated[Path, typer.Option("--data", metavar="FILE", help="A UTF-8 text file.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of the text to use.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens in one window.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda (a GPU), cuda:1 (the second).")]
Threads = Annotated[int | None, typer.Option(min=1, help="Number of threads; torch's choice by default.")]
Overwrite = Annotated[bool, typer.Option(help="Replace the output if it exists.")]
Unreached = Annotated[
    str,
    typer.Option(help="error, or dense: leave out the sites that the text never reaches, such as a vision tower's."),
]
Sites = Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Names, ends of names, globs, or re:...")]
Protocol = Annotated[str, typer.Option(help="Which tokens of a window are sparse: all, dense-prompt or dense-first.")]

# calibrate
CalibrationOutput = Annotated[Path, typer.Option("-o", "--output", help="The calibration to write (safetensors).")]
Criterion = Annotated[str, typer.Option(help="magnitude or weighted_magnitude.")]

# sparsify
Calibrated = Annotated[Path, typer.Argument(metavar="CALIBRATION", help="What `calibrate` wrote.")]
ModelOutput = Annotated[Path, typer.Option("-o", "--output", help="The folder to write the sparse model to.")]
Sparsity = Annotated[float | None, typer.Option(help="The fraction of the weight bytes to skip, e.g. 0.4.")]
MaxKl = Annotated[
    float | None, typer.Option(help="Instead: the largest sparsity within this KL to the dense model (--data).")
]
MaxPerplexityIncrease = Annotated[
    float | None, typer.Option(help="Instead: the largest sparsity within this relative increase, e.g. 0.01.")
]
Allocation = Annotated[str, typer.Option(help="auto, uniform, greedy or sensitivity; all but uniform need --data.")]
FitData = Annotated[
    Path | None, typer.Option("--data", metavar="FILE", help="Text to choose, fit and judge thresholds on.")
]
Weights = Annotated[
    str | None, typer.Option(metavar="FORMAT", help="Quantise the sparse layers: int8, int4, int4-g64, ...")
]
OutputWeights = Annotated[
    str | None,
    typer.Option(metavar="FORMAT", help="Of the output layer, with a tied embedding; int8-g32 with --weights."),
]
Gptq = Annotated[bool, typer.Option("--gptq", help="Round --weights with GPTQ, on the text of --data.")]
Gguf = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Of the same model: its Q8_0, Q4_0 and Q4_1 weights are taken as they are."),
]

# generate and bench
COMPILED_TOKENS = 500
"""From so many tokens on `generate` compiles first: that takes up to a minute."""
Prompt = Annotated[str, typer.Argument(help="The text to continue.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens to add.")]
CompileFirst = Annotated[
    bool | None,
    typer.Option(help=f"Compile decoding first; by default where {COMPILED_TOKENS} tokens or more are to come."),
]
DecodedTokens = Annotated[int, typer.Option(min=2, help="Tokens to decode with each.")]
CompileSparse = Annotated[bool, typer.Option(help="Compile the sparse model's decoding first.")]
BreakEven = Annotated[bool, typer.Option(help="Show from which sparsity each kind of layer gains.")]

# eval
JudgedData = Annotated[Path | None, typer.Option("--data", metavar="FILE", help="A UTF-8 text file to judge on.")]
PromptTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of the prompt (dense-prompt, --continue); half a window by default."),
]
Continuations = Annotated[
    int, typer.Option("--continue", metavar="N", min=0, help="Continue the beginnings of N windows, both models.")
]
ContinuedTokens = Annotated[int, typer.Option(min=1, help="Tokens to add with --continue.")]
Tasks = Annotated[str | None, typer.Option(metavar="A,B", help="Tasks of lm-evaluation-harness, every token sparse.")]
IncludePath = Annotated[Path | None, typer.Option(metavar="DIR", help="A folder with YAML files of more tasks.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Documents of each task; all by default.")]

# sweep
SweptData = Annotated[Path, typer.Option("--data", metavar="FILE", help="A UTF-8 text file to judge on.")]
SweepOutput = Annotated[
    Path,
    typer.Option("-o", "--output", help="The JSON to write, after every run; one that is there is gone on with."),
]
CalibrationData = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A text file to calibrate on; Python's documentation by default."),
]
Html = Annotated[Path | None, typer.Option(help="The page to write; beside the JSON by default.")]
Methods = Annotated[
    str,
    typer.Option(
        metavar="A,B",
        help="Methods to compare. Others are top-k, wina-orthogonal, r-sparse, larosa, sensitivity, and "
        "teal-greedy, which takes many times as long.",
    ),
]
Budgets = Annotated[str, typer.Option(metavar="A,B", help="Fractions of the weight bytes to skip.")]
Windows = Annotated[int, typer.Option(min=1, help="Windows of the text to judge on.")]
CalibrationTokens = Annotated[int, typer.Option(min=1, help="Tokens to calibrate on.")]
SweptPrompt = Annotated[str | None, typer.Option(help="The text that every run continues, and is timed on.")]
Speed = Annotated[
    bool, typer.Option(help="Time decoding beside the dense model, which takes the memory of two models.")
]
BeginAnew = Annotated[bool, typer.Option(help="Begin anew instead of going on with what the output holds.")]

# demo
DemoOutput = Annotated[Path, typer.Option("-o", "--output", help="The folder to leave the results in.")]
