"""Which sites share an input, and sums over the rows that sites see."""

import torch
from torch import nn

from deadband.calibration.row_sums import InputProducts, sample_rows
from deadband.calibration.watcher import SharedInputs


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.up = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        y = self.q(x) + self.k(x.view(-1, 4)).view_as(x)
        x = x.clone()
        y = y + self.v(x)
        return y + self.up(x.add_(1))


def test_sites_share_what_lies_in_the_same_memory_unchanged():
    watcher = SharedInputs()
    watcher.watch(Block(), [torch.randn(2, 3, 4)], ["q", "k", "v", "up"], "inputs", False)
    assert watcher.groups == [["q", "k"], ["v"], ["up"]]


def test_a_square_matrix_and_its_transpose_are_not_the_same_input():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.columns = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.rows(x) + self.columns(x.T)

    watcher = SharedInputs()
    watcher.watch(Both(), [torch.randn(4, 4)], ["rows", "columns"], "inputs", False)
    assert watcher.groups == [["rows"], ["columns"]]


def test_products_leave_out_rows_that_are_not_finite():
    x = torch.randn(6, 4)
    x[2, 1] = torch.nan
    kept = x[[0, 1, 3, 4, 5]]
    for wide in (False, True):
        watcher = InputProducts(["0"], wide=wide)
        watcher.watch(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), [x, x], ["0", "1"], "products", False)
        assert watcher.sums.totals.keys() == {"0"}
        assert watcher.sums.counts == {"0": 10, "1": 10}
        torch.testing.assert_close(watcher.sums.mean("0").float(), kept.T @ kept / 5)


def test_samples_are_spread_over_all_rows():
    rows = torch.arange(100.0)[:, None]
    assert sample_rows(rows, 4, 4).flatten().tolist() == [0, 25, 50, 75]
    assert len(sample_rows(rows[:3], 4, 2)) == 2
