"""The label that means: after this token nothing is trained."""

IGNORED = -100
