import torch
import torch.nn.functional as F

from weakclip.models.adapter import Doubling


def test_a_doubling_is_a_transposed_convolution():
    torch.manual_seed(0)
    doubling, x_BDhw = Doubling(6).double(), torch.randn(2, 6, 3, 5, dtype=torch.float64)
    expected = F.conv_transpose2d(x_BDhw, doubling.weight, doubling.bias, stride=2)
    torch.testing.assert_close(doubling(x_BDhw), expected)


def test_a_doubling_merged_with_the_convolution_that_follows_gives_the_same():
    torch.manual_seed(0)
    doubling, x_BDhw = Doubling(6).double(), torch.randn(2, 6, 3, 5, dtype=torch.float64)
    weight_OD, bias_O = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    expected = F.conv2d(doubling(x_BDhw), weight_OD[:, :, None, None], bias_O)
    torch.testing.assert_close(doubling(x_BDhw, (weight_OD, bias_O)), expected)
