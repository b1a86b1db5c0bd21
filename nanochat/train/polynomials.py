"""
The polynomials with which Muon orthogonalises: a step maps a singular value x to
a x + b x^3 + c x^5, and all steps together take everything in (0, 1] towards 1.
"""

Polynomials = tuple[tuple[float, float, float], ...]  # (a, b, c) of each step

POLYNOMIALS: dict[str, Polynomials] = {
    # Each is the odd quintic with the least largest distance from 1 on the interval onto which
    # those before it map [0.01, 1]: a linear programme, which tests/test_optim.py solves again.
    # They take [0.01, 1] to 1 +- 0.29. The upper end of every interval is raised by 2 %, because
    # beyond it they grow without bound, and bfloat16 rounds that far: without this margin, a
    # gradient of rank one came out up to 40 times too long.
    "minimax": (
        (7.9424, -22.2873, 15.8239),
        (3.5875, -2.5845, 0.4893),
        (2.6604, -1.9134, 0.4194),
    ),
    # Jordan et al., "Muon: an optimizer for hidden layers" (2024)
    "jordan": ((3.4445, -4.7750, 2.0315),) * 5,
}
WIDEST = 512  # width up to which "auto" takes "minimax"; it was tried at 192 and 256


def chosen_polynomials(name: str, width: int) -> Polynomials:
    """
    The steps of `name`, "auto" or a key of POLYNOMIALS, for a model of that width. Wide matrices
    have more singular values below 0.01, which three steps leave small, and spend less of a
    training step on orthogonalising.
    """
    if name == "auto":
        name = "minimax" if width <= WIDEST else "jordan"
    return POLYNOMIALS[name]
