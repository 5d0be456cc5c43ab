"""What was wrong, where, and what to do about it.

Every error that bad input or a bad machine can cause is one of these. A stage prints
its text alone, without a traceback, so the text has to be enough to act on.
"""

from __future__ import annotations


class ShareBasisError(Exception):
    """The base of every error below."""


class SettingsError(ShareBasisError):
    """A parameter is unknown, missing or out of range."""


class SourceError(ShareBasisError):
    """The model's source cannot be found or read."""


class WeightsError(ShareBasisError):
    """A tensor on disk is missing, truncated or not finite."""


class SelectionError(ShareBasisError):
    """No sublayer, or the wrong ones, answer to the given patterns."""


class SplitError(ShareBasisError):
    """A weight cannot be cut into the parts that were asked for."""


class TextError(ShareBasisError):
    """There is no text, or too little of it."""


class CalibrationError(ShareBasisError):
    """A moment is not usable: no tokens, not finite, or of the wrong width."""


class BudgetError(ShareBasisError):
    """No rank meets the removed fraction that was asked for."""


class PropagationError(ShareBasisError):
    """The blocks of a model cannot be run one by one."""


class RecoveryError(ShareBasisError):
    """There is nothing to train, or training went astray."""


class StateError(ShareBasisError):
    """A ShareLinear was asked for a transition that its state does not allow."""


class StreamError(ShareBasisError):
    """The residual stream, or something in it, cannot be taken apart as asked."""


class StoreError(ShareBasisError):
    """An artefact is missing, damaged or cannot be written."""


class ResourceError(ShareBasisError):
    """The machine has too little memory for what was asked."""


class GitError(ShareBasisError):
    """Git refuses what it was asked for."""


class SweepError(ShareBasisError):
    """A sweep cannot begin, or a point of it has failed."""
