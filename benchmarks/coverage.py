"""What share of the weights between embedding and output layer are sites, for every causal model type of transformers.

Each type at the sizes of its default configuration, on the meta device: nothing is computed. The rest are routers,
convolutions, state-space parameters, norms and layers of classes that are unknown.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import transformers
from common import parser, save
from transformers.models.auto import configuration_auto, modeling_auto

from deadband.layers.sites import find_blocks, find_sites
from deadband.layers.sparse import tensor_of

ENOUGH = 0.95


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--types", nargs="+", help="model types instead of all")
    options = made.parse_args()
    rows: list[dict[str, Any]] = []
    refused = []
    for kind in options.types or sorted(set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        try:
            rows.append({"type": kind, **coverage(kind)})
        except Exception as error:  # default configurations that no model can be built from, or packages that lack
            refused.append(f"{kind}: {type(error).__name__}")
            continue
        print(f"{kind:32} {rows[-1]['share']:7.2%} of {rows[-1]['bytes'] / 1e9:9.2f} GB", flush=True)
    enough = sum(row["share"] >= ENOUGH for row in rows)
    least = sorted(rows, key=lambda row: row["share"])[:8]
    print(f"\n{enough} of {len(rows)} types have {ENOUGH:.0%} or more of their decoder's bytes in sites")
    print(f"{len(refused)} cannot be built at their defaults: {', '.join(refused)}")
    if not options.types:
        about = {"threshold": ENOUGH, "types": len(rows), "enough": enough, "refused": len(refused)}
        save("coverage", least, summary=about)


def coverage(kind: str) -> dict[str, Any]:
    """Bytes of the blocks of a model of that type, and which part of them is sites."""
    config = configuration_auto.CONFIG_MAPPING[kind]()
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config)
        sites = find_sites(model)
    blocks = find_blocks(model).values()
    parameters = {id(each): each for block in blocks for each in block.parameters()}
    weights = {id(each): each for each in map(tensor_of, sites.values())}  # of all experts, chosen or not
    total = bytes_of(parameters)
    return {"share": bytes_of(weights) / total, "bytes": total}


def bytes_of(tensors: dict[int, torch.Tensor]) -> int:
    """The bytes of all of them."""
    return sum(each.numel() * each.element_size() for each in tensors.values())


if __name__ == "__main__":
    main()
