"""
The polynomials with which Muon orthogonalises: each step maps every singular value x to
a x + b x^3 + c x^5, and all steps together move the values in (0, 1] towards 1.
"""

Polynomials = tuple[tuple[float, float, float], ...]  # (a, b, c) of each step

POLYNOMIALS: dict[str, Polynomials] = {
    # Each step is the odd quintic whose largest distance from 1 is smallest on the interval that
    # the steps before it map [0.01, 1] to: a linear programme, which tests/test_optim.py solves
    # again. Together they map [0.01, 1] to 1 +- 0.29. The upper end of every interval was raised by
    # 2 %, because the polynomials grow without bound beyond it, and rounding to bfloat16 can reach
    # there: without this margin, the result for a gradient of rank one was up to 40 times too
    # large.
    "minimax": (
        (7.9424, -22.2873, 15.8239),
        (3.5875, -2.5845, 0.4893),
        (2.6604, -1.9134, 0.4194),
    ),
    # Jordan et al., "Muon: an optimizer for hidden layers" (2024)
    "jordan": ((3.4445, -4.7750, 2.0315),) * 5,
}
WIDEST = 512  # model width up to which "auto" is "minimax"; it was tried at 192 and 256


def chosen_polynomials(name: str, width: int) -> Polynomials:
    """
    The polynomials called `name`, "auto" or a key of POLYNOMIALS, for a model of this width. Wide
    models get five steps: their matrices have more singular values below 0.01, which three steps
    leave small, and orthogonalising takes a smaller share of their training step.
    """
    if name == "auto":
        name = "minimax" if width <= WIDEST else "jordan"
    return POLYNOMIALS[name]
