"""Peers: what other ways to send the same slices come to, in the same run."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial

from groundglass_bench.figures import Figure, Work, paired_ratios, take_turns
from groundglass_bench.peers import PEERS
from groundglass_bench.result import Measured, one_line
from groundglass_bench.sending import slices_per_s
from groundglass_bench.serving import Surroundings, near_free_server, real_server
from groundglass_bench.settings import Peers
from groundglass_bench.studies import memory_study, pool_slices
from groundglass_client.connection import connect

_OURS = "ours"


def measure_peers(load: Peers, around: Surroundings) -> Measured:
    """All on the near-free network in turns; then the real network, served and in eager torch."""
    absent: dict[str, str] = {}
    near_free = _on_near_free(load, around, absent)
    real = _on_real(load, around, absent)
    return Measured(
        figures=(*near_free, *real),
        absent=absent,
        notes=(
            "ours: through shared memory where the server allows it. ours_grpc: as bytes. one_message: to a repository "
            f"copy whose max_batch_size was raised to {load.message_slices}; ours may carry 64. pytriton: preprocess, "
            "near-free network and fold in one Python function, the same chunks and window. http_json: one slice a "
            "request, tensors as JSON. served_real and torch_real: the shipped network, as the repository serves it "
            "and in eager torch FP32 in this process, one slice at a time.",
        ),
    )


def _on_near_free(load: Peers, around: Surroundings, absent: dict[str, str]) -> list[Figure]:
    with near_free_server(around) as server, ExitStack() as stack:
        works = {}
        for name, open_peer in PEERS.items():
            try:
                work = stack.enter_context(open_peer(load, around, server))
                around.tell(f"{name}: {work():.1f} slices/s at first")
                works[name] = work
            except Exception as error:  # the peers' libraries share no root of their errors
                absent[name] = one_line(error)
        rates = take_turns(works, load.repetitions)
    figures = [Figure(name, "slices/s", found) for name, found in rates.items()]
    return [*_ratios(rates), *figures]


def _ratios(rates: dict[str, tuple[float, ...]]) -> list[Figure]:
    if _OURS not in rates:
        return []
    others = [name for name in rates if not name.startswith(_OURS)]
    return [
        Figure(f"{mine}_over_{name}", "", paired_ratios(rates[mine], rates[name]))
        for mine in rates
        if mine.startswith(_OURS)
        for name in others
    ]


def _on_real(load: Peers, around: Surroundings, absent: dict[str, str]) -> list[Figure]:
    try:
        network = around.open_torch()
    except Exception as error:  # no torch, no weights, or weights of another network
        absent["torch_real"] = one_line(error)
        return []
    study, decode = memory_study(load.served_slices)
    slices = pool_slices(load.torch_slices)

    def in_torch() -> float:
        started = time.perf_counter()
        for hu in slices:
            network(hu[None])
        return len(slices) / (time.perf_counter() - started)

    with real_server(around) as server, connect(server.grpc) as transport:
        works: dict[str, Work] = {
            "served_real": partial(slices_per_s, study, transport, decode, masks=load.masks),
            "torch_real": in_torch,
        }
        rates = take_turns(works, load.repetitions, load.warm_up)
    return [
        Figure("served_over_torch", "", paired_ratios(rates["served_real"], rates["torch_real"])),
        *(Figure(name, "slices/s", found) for name, found in rates.items()),
    ]
