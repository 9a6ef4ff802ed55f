import pytest
import torch

from quantool.formats.int4_layouts import dequantize, pack, unpack


def test_the_word_is_autoawqs() -> None:
    # AutoAWQ 0.2.9, awq/utils/packing_utils.py: AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7], four bits each from below
    assert pack(torch.arange(8).view(1, 8)).item() == 0x75316420
    assert pack(torch.full((1, 8), 15)).item() == -1


def test_unpack_undoes_pack() -> None:
    values = torch.randint(0, 16, (5, 24))
    assert torch.equal(unpack(pack(values)), values.to(torch.int32))


@pytest.mark.parametrize("group", [2, 4])
def test_zero_points_and_scales_are_those_of_the_group(group: int) -> None:
    inputs, outputs = 8, 16
    levels = torch.randint(0, 16, (inputs, outputs))
    zeros = torch.randint(0, 16, (inputs // group, outputs))
    scales = torch.rand(inputs // group, outputs).half()
    weight = dequantize({"qweight": pack(levels), "qzeros": pack(zeros), "scales": scales})
    assert weight.shape == (outputs, inputs)
    for out, column in ((0, 0), (3, inputs - 1), (outputs - 1, group)):
        place = (column // group, out)
        assert weight[out, column] == float(levels[column, out] - zeros[place]) * float(scales[place])
