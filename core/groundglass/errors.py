"""Everything that Groundglass raises on purpose.

::

    GroundglassError
    |-- StudyError              a study on disk can't be analysed as it is
    |   |-- UnreadableFile      one file: not DICOM, truncated, undecodable
    |   |-- NotACtSlice         one file: readable, but no CT image
    |   |-- NoSeries            nothing in the study makes a CT series
    |   `-- GeometryError       slices that don't belong to one volume
    |-- AggregationError        rows that contradict each other or their study
    |-- ServerError             the inference server
    |   |-- ServerUnreachable   no answer within the deadline
    |   |   `-- TlsFailed       client and server don't agree on TLS: another try fails as well
    |   |-- ServerRefused       it answered, and said no
    |   |   `-- VersionGone     it no longer serves the model version that was asked for
    |   |-- DeadlinePassed      the caller's own time limit is over
    |   `-- ServeFailed         the embedded server did not start
    |-- ModelError              a checkpoint, an export or a repository
    |   |-- CheckpointError
    |   |-- ParityError
    |   |-- RepositoryError
    |   `-- VersionRefused      a model version can't take the step that was asked for
    |-- SettingError            a flag, an environment variable, a configuration value
    `-- MissingExtra            an optional package is not installed

A message says what was found, what was expected, where (file, series, model, version) and what to do. It never holds a
patient's name or ID.
"""

from __future__ import annotations


class GroundglassError(Exception):
    """The root: catch this to catch everything that Groundglass raises on purpose."""


class StudyError(GroundglassError):
    """A study on disk can't be analysed as it is."""


class UnreadableFile(StudyError):
    """A file could not be read or decoded."""


class NotACtSlice(StudyError):
    """A file was read, and holds no CT image."""


class NoSeries(StudyError):
    """Nothing in the study makes a CT series."""


class GeometryError(StudyError):
    """The slices do not belong to one volume: other size, other orientation, no position."""


class AggregationError(GroundglassError):
    """Rows of a scan contradict each other: index out of range, another slice count, a changed verdict."""


class ServerError(GroundglassError):
    """The inference server failed the caller."""


class ServerUnreachable(ServerError):
    """No answer came within the deadline."""


class TlsFailed(ServerUnreachable):
    """Client and server don't agree on TLS or on a certificate: another try fails until somebody changes something."""


class ServerRefused(ServerError):
    """The server answered, and refused the request."""


class VersionGone(ServerRefused):
    """The server does not serve the model version that was asked for, or no longer."""


class DeadlinePassed(ServerError):
    """The time limit that the caller set is over."""


class ServeFailed(ServerError):
    """The embedded server did not become ready, or died."""


class ModelError(GroundglassError):
    """A checkpoint, an export or a model repository is not usable."""


class CheckpointError(ModelError):
    """A checkpoint is corrupted, or holds another network."""


class ParityError(ModelError):
    """An exported graph does not compute what the checkpoint computes."""


class RepositoryError(ModelError):
    """A model repository breaks the tensor contract or lacks a file."""


class VersionRefused(ModelError):
    """A model version can't take the step that was asked for: staged, verified, promoted, rolled back, retired."""


class SettingError(GroundglassError):
    """A flag, an environment variable or a configuration value is unusable."""


class MissingExtra(GroundglassError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: it comes with the extra, pip install 'groundglass[{extra}]'")
        self.package = package
        self.extra = extra
