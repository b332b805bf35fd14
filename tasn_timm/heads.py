"""Classifiers on the pooled features of the structure- and the detail-preserved image (Sec. 3.3)."""

from torch import Tensor, nn

from .errors import unknown

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

    def forward_pair(self, structure: Tensor, detail: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Classify pooled features (B, C) of both views.

        Returns:
            Logits (B, K) of the predictor and of the master on the structure image, of the part net and of the shared
            classifier on the detail image. With "shared" and "separate" the first two are one tensor, and the last two.
        """
        if self.heads == "both":
            return self.shared(structure), self.master(structure), self.part(detail), self.shared(detail)
        student = self.predictor(structure)
        teacher = self.shared(detail) if self.heads == "shared" else self.part(detail)
        return student, student, teacher, teacher
