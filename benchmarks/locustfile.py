"""Whole studies as a load on a server, with locust's web page or without.

    locust -f benchmarks/locustfile.py --host localhost:8001
    locust -f benchmarks/locustfile.py --host localhost:8001 --headless --users 4 --slices 100..4000 --run-time 60s
    locust -f benchmarks/locustfile.py --host localhost:8001 --headless --loop open --rate 0.5 --run-time 60s

The first serves http://localhost:8089, whose host field takes the server's HOST:PORT. Our options are the last that
``--help`` lists. ``--stop-timeout 60`` waits up to 60 s for the studies in flight at the end. For a server that speaks
TLS, GROUNDGLASS_TLS_CA, _CERT and _KEY name the files (docs/connecting.md).
"""

from groundglass_bench.load.locustfile import StudyUser

__all__ = ["StudyUser"]
