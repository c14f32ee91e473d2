"""The tree of errors. Every message says what happened, got/expected, and the cure.

    RlsfError                     exit code
      InputError                  2   a bad config, model, data file or address; raised before anything heavy starts
      NoPairsError                3   every prompt was filtered; counts the reasons
      GuardError                  3   the guard has stopped the run; names the signs with their numbers
      ServiceError                4   something that ran has failed
        NonFiniteLossError            the loss became nan or inf; the batch's ids are in the message
        EngineError                   generation or weight loading failed
        WeightsError                  a version arrived changed, twice, or not at all
        StorageError                  the run directory cannot be read or written
        DeadlineError                 a wait ended; names who has not answered
      DrainedError                5   the run was asked to stop and can be resumed

Every error takes one string, so it pickles across processes unchanged.
"""

from __future__ import annotations


class RlsfError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code = 4


class InputError(RlsfError, ValueError):
    """The user's input is wrong: a config key, a model, a data file, an address."""

    exit_code = 2


class NoPairsError(RlsfError):
    """No prompt gave a preference pair, so nothing can be learned."""

    exit_code = 3


class GuardError(RlsfError):
    """A version shows signs of collapse, and the run was told to stop there."""

    exit_code = 3


class ServiceError(RlsfError):
    """A part of the running service failed."""


class NonFiniteLossError(ServiceError):
    """The loss or the gradient is nan or inf."""


class EngineError(ServiceError):
    """An engine could not generate or load weights."""


class WeightsError(ServiceError):
    """A weights version is unknown, changed, or not what was asked for."""


class StorageError(ServiceError):
    """The run directory cannot be read or written."""


class DeadlineError(ServiceError, TimeoutError):
    """A wait reached its deadline."""


class DrainedError(RlsfError):
    """The run stopped on request before it was finished; the same command resumes it."""

    exit_code = 5
