"""The kinds of scenarios: each measures one thing, and compares what takes turns in the same call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from groundglass_bench.kinds.ceiling import measure_ceiling
from groundglass_bench.kinds.efficiency import measure_efficiency
from groundglass_bench.kinds.hidden_decode import measure_hidden_decode
from groundglass_bench.kinds.open_loop import measure_open_loop
from groundglass_bench.kinds.peers import measure_peers
from groundglass_bench.kinds.scaling_replicas import measure_scaling_replicas
from groundglass_bench.kinds.scaling_slices import measure_scaling_slices
from groundglass_bench.kinds.scaling_users import measure_scaling_users
from groundglass_bench.kinds.soak import measure_soak
from groundglass_bench.kinds.swaps import measure_swaps
from groundglass_bench.result import Measured
from groundglass_bench.serving import Surroundings


@dataclass(frozen=True, slots=True)
class Kind:
    """``measure`` takes the kind's settings and the surroundings.

    real_network: it serves the repository as it is, which must be whole then.
    given_server: what it does where the user's server is named. ``runs``; ``asked`` only when its scenario is named,
    since it offers more load than the server can take; ``local`` only when that server is on this machine; ``own``
    never, since it needs a network of its own.
    """

    measure: Callable[[Any, Surroundings], Measured]
    real_network: bool
    given_server: str


KINDS: Final[Mapping[str, Kind]] = MappingProxyType(
    {
        "efficiency": Kind(measure_efficiency, real_network=True, given_server="local"),
        "hidden_decode": Kind(measure_hidden_decode, real_network=True, given_server="runs"),
        "ceiling": Kind(measure_ceiling, real_network=False, given_server="own"),
        "peers": Kind(measure_peers, real_network=True, given_server="own"),
        "scaling_slices": Kind(measure_scaling_slices, real_network=False, given_server="runs"),
        "soak": Kind(measure_soak, real_network=False, given_server="own"),
        "scaling_users": Kind(measure_scaling_users, real_network=False, given_server="runs"),
        "scaling_replicas": Kind(measure_scaling_replicas, real_network=False, given_server="own"),
        "open_loop": Kind(measure_open_loop, real_network=False, given_server="asked"),
        "swaps": Kind(measure_swaps, real_network=False, given_server="own"),
    }
)
"""By the name in a scenario's file."""
