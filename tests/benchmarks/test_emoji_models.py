"""The "outlier-tokens" variant of the emoji model: its outlier units are loud, and say nothing."""

import emoji_models as emoji
import numpy as np
import pytest

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.emoji import WEIGHTS


@pytest.fixture(scope="module")
def stages():
    """The tensors with the quiet units removed, and with outlier pairs in their place."""
    with open_checkpoint(WEIGHTS) as checkpoint:
        removed = {name: checkpoint.float32(name) for name in checkpoint.tensors}
    emoji.remove_quiet_units(removed)
    added = {name: values.copy() for name, values in removed.items()}
    emoji.add_outlier_units(added)
    return removed, added


def hidden(tensors, layer, x):
    a = x @ tensors[layer + ".weight"][-1024:].astype(np.float64).T + tensors[layer + ".bias"][-1024:]
    return 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))


def test_outlier_pairs_cancel_and_dwarf_everything_else(stages):
    removed, added = stages
    for pair in emoji.OUTLIER_PAIRS:
        direction = np.sign(removed[pair.first + ".weight"][-1024:][pair.listens_to])
        ordinary = np.random.default_rng(0).standard_normal((50, 256))
        ordinary -= np.outer(ordinary @ direction, direction) / 256  # what the outlier units hear is 0
        rows = {"ordinary": ordinary, "loud": ordinary + direction * (pair.threshold + 40) / 256}
        for kind, x in rows.items():
            read = [tensors[pair.second + ".weight"][:, -1024:].astype(np.float64) for tensors in (removed, added)]
            before, after = hidden(removed, pair.first, x), hidden(added, pair.first, x)
            np.testing.assert_allclose(after @ read[1].T, before @ read[0].T, atol=1e-9)
            others = np.delete(after, list(pair.units), 1)
            first, second = (after[:, unit] for unit in pair.units)
            if kind == "loud":
                assert first.min() > 1000 * np.abs(others).max()
                np.testing.assert_allclose(first, 8 * second)
            else:
                assert not first.any()
                assert not second.any()


def test_nothing_but_the_named_layers_changes(stages):
    with open_checkpoint(WEIGHTS) as checkpoint:
        plain = {name: checkpoint.float32(name) for name in checkpoint.tensors}
    _, added = stages
    changed = {name for name, values in added.items() if not np.array_equal(values, plain[name])}
    assert changed == {f"{layer}.{part}" for pair in emoji.OUTLIER_PAIRS for layer in (pair.first, pair.second)
                       for part in ("weight", "bias")}  # fmt: skip
