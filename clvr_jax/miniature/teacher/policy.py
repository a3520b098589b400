"""How the teacher works, and when it gives a picture up."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is for the user of the teacher to choose.

    Attributes:
      stepwise: share of the complicated prompts of which only the first things are drawn at first;
        the others are asked for whole, as the user says them.
      complicated: things from which on a prompt is complicated.
      hopeless: a picture with more faults than this is drawn anew.
      patience: every so many pictures that are no better than an earlier one, all is drawn anew.
      bring: share of the missing things that an earlier picture has in a free place which are
        taken from there.
      oversight: share of things that are overlooked when what is asked for is looked for, and found
        when what is left over is gone through; for lessons, from which it is learnt to go on
        after an error.
    """

    stepwise: float = 0.5
    complicated: int = 4
    hopeless: int = 4
    patience: int = 3
    bring: float = 0.5
    oversight: float = 0.0
