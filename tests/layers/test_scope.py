"""What with-blocks set holds for the thread or task in the block alone."""

import asyncio
import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import mlp, sparse_model, tiny_batches, tiny_model
from torch import nn

import deadband
from deadband.calibration.watcher import thresholding
from deadband.evaluation.methods import METHODS, Setup
from deadband.evaluation.quality import evaluate
from deadband.layers import scope
from deadband.layers.sites import sparse_sites
from deadband.layers.sparse import DECODE_ROWS
from deadband.running.forward import evaluating, threads
from deadband.sparsify.report import counting
from deadband.sparsify.sparsify import sparsify_

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
THRESHOLDS = {"0": 0.8, "2": 0.3, "4": 0.3}


@pytest.fixture(autouse=True)
def nothing_stays_open():
    yield
    assert not scope.any_open
    assert not scope.open_scopes()


def elsewhere(function):
    """What a function returns in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def outputs(model, x=X):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_blocks_hold_for_their_thread_alone(weights):
    model = sparsify_(mlp(), THRESHOLDS, weights=weights)
    many = torch.randn(9, 16)
    sparse, plain, prefill = outputs(model), outputs(model, many)[:3], outputs(model, many)
    with deadband.dense(model):
        here = outputs(model)
        assert torch.equal(elsewhere(lambda: outputs(model)), sparse)
        assert not torch.equal(here, sparse)
        with deadband.sparse_prefill(model):
            assert not torch.equal(outputs(model, many), prefill)
            assert torch.equal(elsewhere(lambda: outputs(model, many)), prefill)
        assert torch.equal(outputs(model), here)
        assert all(site.sparse_rows == DECODE_ROWS for site in sparse_sites(model).values())
    assert torch.equal(outputs(model), sparse)
    assert torch.equal(outputs(model, many)[:3], plain)


@pytest.mark.parametrize("mode", ["eval", "train", "gradients"])
def test_every_path_looks_at_the_block(mode):
    masks = {"0": torch.arange(16) % 3 > 0}
    model, reference = sparsify_(mlp(), THRESHOLDS, masks=masks), mlp()
    model.train(mode == "train")
    with deadband.dense(model), torch.set_grad_enabled(mode == "gradients"):
        torch.testing.assert_close(model(X), reference(X))
    assert not torch.allclose(model(X), reference(X))


def test_another_model_and_parts_of_one():
    model, other = sparsify_(mlp(), THRESHOLDS), sparsify_(mlp(), THRESHOLDS)
    expected = outputs(other)
    with deadband.dense(model):
        assert torch.equal(outputs(other), expected)
        assert torch.equal(outputs(copy.deepcopy(model)), expected)  # a copy is a model of its own
    with deadband.dense(model[0]):
        part = outputs(model)
    torch.testing.assert_close(part, outputs(sparsify_(mlp(), {"2": 0.3, "4": 0.3})))


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, GeneratorExit])
def test_whatever_ends_a_block(error):
    model = sparsify_(mlp(), THRESHOLDS)
    expected = outputs(model)
    with pytest.raises(error), deadband.dense(model), deadband.sparse_prefill(model):
        raise error
    assert torch.equal(outputs(model), expected)


def test_generators_left_in_any_order_and_anywhere():
    model = sparsify_(mlp(), THRESHOLDS)
    expected = outputs(model)

    def inside(block):
        with block(model):
            yield outputs(model)

    first, second = inside(deadband.dense), inside(deadband.sparse_prefill)
    assert not torch.equal(next(first), expected)
    next(second)
    first.close()
    elsewhere(second.close)  # the thread that began it is out of it too
    assert torch.equal(outputs(model), expected)
    scope._enter(())  # an empty scope is left over here
    third = inside(deadband.dense)
    next(third)
    del third
    gc.collect()
    assert torch.equal(outputs(model), expected)


def test_tasks_take_turns():
    model = sparsify_(mlp(), THRESHOLDS)
    sparse = outputs(model)
    with deadband.dense(model):
        plain = outputs(model)

    async def work(block):
        found = []
        for _ in range(3):
            if block:
                with deadband.dense(model):
                    await asyncio.sleep(0)
                    found.append(outputs(model))
            else:
                await asyncio.sleep(0)
                found.append(outputs(model))
        return found

    async def both():
        return await asyncio.gather(*(work(index % 2) for index in range(4)))

    for index, found in enumerate(asyncio.run(both())):
        assert all(torch.equal(each, plain if index % 2 else sparse) for each in found)


def test_compiled_code_looks_at_the_block():
    model = sparsify_(mlp(), THRESHOLDS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    sparse = outputs(compiled)
    with deadband.dense(model):
        plain = outputs(compiled)
        assert torch.equal(elsewhere(lambda: outputs(compiled)), sparse)
        exported = torch.export.export(model, (X,)).module()
    assert torch.equal(outputs(compiled), sparse)
    assert not torch.equal(plain, sparse)
    torch.testing.assert_close(plain, outputs(mlp()))
    torch.testing.assert_close(outputs(exported), plain)
    torch.compiler.reset()  # a code object is compiled a few times at most, in all tests together


def test_what_a_block_counts_is_its_own():
    model = sparsify_(mlp(), THRESHOLDS)
    outputs(model)
    alone = deadband.sparsity(model, reset=True)
    with counting(model) as report:
        outputs(model)
        elsewhere(lambda: outputs(model, torch.randn(2, 16)))
        assert report() == alone
        assert deadband.sparsity(model).entries == alone.entries // 3 * 2
    assert deadband.sparsity(model).entries == alone.entries // 3 * 5  # nothing is lost
    with pytest.raises(ValueError, match="count=True"), counting(sparsify_(mlp(), THRESHOLDS, count=False)):
        pass


def test_reading_while_another_thread_counts_loses_nothing():
    model = sparsify_(nn.Sequential(nn.Linear(16, 4)).eval(), {"0": 0.5})
    calls, entries = 300, 0
    worker = threading.Thread(target=lambda: [outputs(model) for _ in range(calls)])
    worker.start()
    while worker.is_alive():
        entries += deadband.sparsity(model, reset=True).entries
    worker.join()
    assert entries + deadband.sparsity(model).entries == calls * X.numel()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
def test_generating_while_others_evaluate_and_calibrate(name):
    model, batches = sparse_model(name), tiny_batches(3, rows=1)
    prompt = batches[0]["input_ids"][:, :8]
    expected = model.generate(prompt, max_new_tokens=24, do_sample=False)
    alone = evaluate(model, batches, progress=False)
    calibrated = deadband.calibrate(model, batches, progress=False)
    stop, found = threading.Event(), []

    def judge():
        found.append(evaluate(model, batches, progress=False))

    def calibrate():
        found.append(deadband.calibrate(model, batches, progress=False))

    def generate():
        while not stop.is_set():
            found.append(torch.equal(model.generate(prompt, max_new_tokens=24, do_sample=False), expected))

    def until_done(*work):
        workers = [threading.Thread(target=each) for each in work]
        [each.start() for each in workers], [each.join() for each in workers]
        stop.set()

    background = threading.Thread(target=generate)
    background.start()
    until_done(judge, judge, calibrate)
    background.join()
    evaluations = [each for each in found if isinstance(each, deadband.Evaluation)]
    assert evaluations == [alone] * 2
    assert False not in found
    assert True in found
    (own,) = [each for each in found if isinstance(each, deadband.Calibration)]
    for site in calibrated.sites:
        assert own.sites[site].entries == calibrated.sites[site].entries
        assert own.sites[site].rows.tolist() == calibrated.sites[site].rows.tolist()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_masks_and_simulations_hold_for_their_thread_alone():
    model = mlp()
    expected = outputs(model)
    rules = {name: deadband.Rule(0.5) for name in THRESHOLDS}
    with thresholding({name: model.get_submodule(name) for name in rules}, rules):
        assert not torch.equal(outputs(model), expected)
        assert torch.equal(elsewhere(lambda: outputs(model)), expected)
    (simulation,) = METHODS["top-k"].fit(Setup(model, [torch.randn(64, 16)], progress=False), [0.5])
    with simulation.on(model):
        assert not torch.equal(outputs(model), expected)
        assert torch.equal(elsewhere(lambda: outputs(model)), expected)

        def again():
            with simulation.on(model):
                pass

        with pytest.raises(ValueError, match="in another thread"):
            elsewhere(again)
    again()


def test_eval_mode_lasts_until_the_last_block():
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    model[1].eval()
    entered, leave = threading.Event(), threading.Event()

    def work():
        with evaluating(model):
            entered.set()
            leave.wait(10)
            return torch.is_grad_enabled(), [module.training for module in model.modules()]

    with ThreadPoolExecutor(1) as pool:
        with evaluating(model):
            assert torch.is_grad_enabled() is False
            task = pool.submit(work)
            assert entered.wait(10)
        assert not any(module.training for module in model.modules())
        assert torch.is_grad_enabled()
        leave.set()
        assert task.result() == (False, [False] * 5)
    assert [module.training for module in model.modules()] == [True, True, False, False, False]


def test_threads_nest_and_overlap():
    before = torch.get_num_threads()
    with threads(before + 2):
        with threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == before + 2

        def overlapping():
            with threads(1):
                pass
            return torch.get_num_threads()

        assert elsewhere(overlapping) == before
    assert torch.get_num_threads() == before == elsewhere(torch.get_num_threads)


def test_layers_left_by_a_block_can_go_on_elsewhere():
    """A forward that began before the block of another thread ends with its own settings, whatever layer it is at."""
    model = sparsify_(mlp(), THRESHOLDS)
    expected = outputs(model)
    entered, go = threading.Event(), threading.Event()

    def pause(module, args):
        entered.set()
        go.wait(10)

    handle = model[2].register_forward_pre_hook(pause)
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(lambda: outputs(model))
        assert entered.wait(10)
        handle.remove()
        with deadband.dense(model):
            go.set()
            assert torch.equal(task.result(), expected)


def test_models_in_blocks_of_two_threads_end_sparse():
    model = sparsify_(tiny_model("llama"), exact=True)
    blocks = (deadband.dense, deadband.sparse_prefill)

    def work(index):
        for _ in range(200):
            with blocks[index](model):
                pass

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (0, 1)))
    assert {site.sparse_rows for site in sparse_sites(model).values()} == {DECODE_ROWS}
