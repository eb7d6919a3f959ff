"""Versions of ``unet``: staged, verified, promoted, rolled back and retired, under load, with nothing dropped.

::

            stage          verify            promote
    (files) -----> staged -------> verified -------> live
                     |   <-------     |  ^             |
                     |     retire,    |  '-------------'
                     |     verify     |     rollback, or the promotion of another
                     '---> retired <--'
                    retire           retire

The files of the repository decide what is served: ``unet``'s version policy says which versions are loaded, the step
``unet`` of ``ct_scan`` which of them is live, and ``ct_scan_v<N>`` lets a client ask for one by name. A transition is
one function. Each writes what it is about to do, and how it ended, to ``versions.jsonl``.
"""

from groundglass_ensemble.versions.checks import Check
from groundglass_ensemble.versions.control import Served, ServerControl
from groundglass_ensemble.versions.desk import Desk, settle
from groundglass_ensemble.versions.folder import VersionFolder
from groundglass_ensemble.versions.journal import Journal, Record
from groundglass_ensemble.versions.promoting import Watch, previous_version, promote, rollback
from groundglass_ensemble.versions.staging import retire, stage
from groundglass_ensemble.versions.status import State, Status, servers_alone, status
from groundglass_ensemble.versions.verifying import Candidate, Trial, Verification, verify

__all__ = [
    "Candidate",
    "Check",
    "Desk",
    "Journal",
    "Record",
    "Served",
    "ServerControl",
    "State",
    "Status",
    "Trial",
    "Verification",
    "VersionFolder",
    "Watch",
    "previous_version",
    "promote",
    "retire",
    "rollback",
    "servers_alone",
    "settle",
    "stage",
    "status",
    "verify",
]
