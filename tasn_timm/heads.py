"""Classifiers on the pooled features of the two views (Sec. 3.3), and second-order pooling (Table 7)."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .errors import UserError, unknown
from .precision import no_autocast

# Which classifiers exist, the predicting one first.  "both": the published result, whose shared classifier is one point
# better than the master classifier that Eq. 8 distils into.  "separate": the paper's text.  "shared": its option.
HEADS = {"both": ("shared", "master", "part"), "shared": ("shared",), "separate": ("master", "part")}


class Heads(nn.Module):
    """The classifiers of master and part net.

    Args:
        heads: "both", "shared" or "separate".
        in_features: Width of the pooled features.
        num_classes: K; with 0 every classifier is the identity.
    """

    def __init__(self, heads: str, in_features: int, num_classes: int, device=None, dtype=None) -> None:
        super().__init__()
        if heads not in HEADS:
            raise unknown("heads", heads, HEADS)
        self.heads = heads
        for name in HEADS[heads]:
            linear = nn.Linear(in_features, num_classes, device=device, dtype=dtype) if num_classes else nn.Identity()
            self.add_module(name, linear)

    @property
    def predictor(self) -> nn.Module:
        """The classifier whose logits on the structure image are the prediction."""
        return self.get_submodule(HEADS[self.heads][0])

    def forward(self, structure: Tensor) -> Tensor:
        """Predict from pooled features (B, C) of the structure image: logits (B, K)."""
        return self.predictor(structure)

    def forward_views(self, structure: Tensor | None, detail: Tensor | None) -> tuple[Tensor | None, ...]:
        """Classify pooled features of both views, structure (B, C) and detail (parts * B, C), or of one.

        Returns:
            Logits of the predictor and of the master on the structure image, (B, K), of the part net and of the shared
            classifier on the detail images, (parts * B, K); None for a view that is not there. With "shared" and
            "separate" the predictor is the master and there is no other classifier of details: the second and the last
            are None.
        """
        if self.heads == "both":
            return self.shared(structure), self.master(structure), self.part(detail), self.shared(detail)
        student = None if structure is None else self.predictor(structure)
        teacher = None if detail is None else self.get_submodule(HEADS[self.heads][-1])(detail)
        return student, None, teacher, None


@register_notrace_module
class SecondOrderPool(nn.Module):
    """iSQRT-COV pooling (Li et al., CVPR 2018; Table 7): the square root of the features' covariance, as a vector.

    The features are reduced to fewer channels by a 1 x 1 convolution, BatchNorm and ReLU, as in the published code
    (jiangtaoxie/fast-MPN-COV: src/network/mpncovresnet.py). From the covariance on everything is in float32 at least.

    Args:
        in_features: Channels C of the features.
        channels: d, after the reduction.
        iterations: Newton-Schulz steps, see `matrix_sqrt`.
        prefix_tokens: Leading tokens that are no positions: class token, registers.
        output_fmt: "NCHW" or "NHWC", of features in four dimensions.
    """

    def __init__(
        self,
        in_features: int,
        channels: int = 256,
        iterations: int = 5,
        *,
        prefix_tokens: int = 0,
        output_fmt: str = "NCHW",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        _check_iterations(iterations)
        if channels < 1:
            raise UserError(
                f"second-order pooling needs at least 1 channel, got {channels}: 256 is the published number."
            )
        self.prefix_tokens = prefix_tokens
        self.output_fmt = output_fmt
        self.reduce = nn.Sequential(
            nn.Conv1d(in_features, channels, 1, bias=False, **dd), nn.BatchNorm1d(channels, **dd), nn.ReLU()
        )
        nn.init.kaiming_normal_(self.reduce[0].weight, mode="fan_out", nonlinearity="relu")
        self.iterations = iterations
        self.num_features = channels * (channels + 1) // 2  # 32896 for 256 channels, the paper's 32k

    def forward(self, x: Tensor) -> Tensor:
        """Pool maps (B, C, h, w), or (B, h, w, C), or tokens (B, N, C), to (B, d (d + 1) / 2)."""
        if x.ndim == 3:
            x = x[:, self.prefix_tokens :].mT
        elif self.output_fmt == "NHWC":
            x = x.movedim(-1, 1)
        x = x.flatten(2)  # (B, C, N)
        if x.shape[2] < 2:
            raise UserError("second-order pooling needs features at several positions, got 1: use larger images.")
        reduced = self.reduce(x)
        with no_autocast(x.device):
            root = matrix_sqrt(covariance(reduced), self.iterations)
            row, column = torch.triu_indices(*root.shape[1:], device=root.device)
            return root[:, row, column].to(x.dtype)


def covariance(x: Tensor) -> Tensor:
    """Covariance (B, C, C) of features (B, C, N) over their N positions, divided by N; in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x - x.mean(2, keepdim=True)
    return x @ x.mT / x.shape[2]


def matrix_sqrt(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Approximate square root of symmetric positive semi-definite matrices by coupled Newton-Schulz iteration.

    The matrix is divided by its trace first, which puts the eigenvalues where the iteration converges, and the root is
    multiplied by the trace's root afterwards. Products only, so it is quick on a GPU and easy to differentiate. Five
    steps leave the small eigenvalues' roots too small, which the iSQRT-COV paper found to do no harm.

    Args:
        matrix: (B, d, d). A matrix of zeros gives zeros, with a finite gradient.
        iterations: Steps, 2 or more.

    Returns:
        (B, d, d), converging to the root with more steps.
    """
    _check_iterations(iterations)
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp(min=torch.finfo(matrix.dtype).eps ** 2)
    three = 3 * torch.eye(matrix.shape[1], device=matrix.device, dtype=matrix.dtype)
    y = matrix / trace
    step = (three - y) / 2
    y, z = y @ step, step
    for _ in range(iterations - 2):
        step = (three - z @ y) / 2
        y, z = y @ step, step @ z
    return y @ (three - z @ y) / 2 * trace.sqrt()


def _check_iterations(iterations: int) -> None:
    if iterations < 2:
        raise UserError(
            f"second-order pooling needs at least 2 iterations, got {iterations}: 5 is the published number."
        )
