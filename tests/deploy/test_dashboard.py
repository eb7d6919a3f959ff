"""The dashboard's panels on what real servers, the balancer and Prometheus say after a study."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml
from tritonclient.utils import InferenceServerException

from balancer import HOST
from calls import infer, scan_rows
from client_study import QUICK, Decoder, study_of
from groundglass import contract
from groundglass.tls import TlsSettings
from groundglass_client.connection import connect
from groundglass_client.session import analyse
from metrics_server import Monitored, all_rules, monitored
from waiting import wait_until

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "deploy" / "grafana"
PLOT = ROOT / "benchmarks" / "dashboard_plot.py"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "groundglass.json").read_text())
PANELS = DASHBOARD["panels"]
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in PANELS
    for target in panel.get("targets", ())
]
GPU_ONLY = {"nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes", "nv_gpu_utilization"}
"""Metrics that a server has only where it sees a GPU: their names and labels are as documented, not as seen."""

_METRIC = re.compile(r"\b(?:\w+:)?(?:nv|haproxy|groundglass)_\w+(?::\w+)?")


def metrics_of(expression: str) -> set[str]:
    """The metrics that an expression names, those that Prometheus makes itself aside."""
    return set(_METRIC.findall(expression))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, probe_repository: Path) -> Iterator[Monitored]:
    """Two servers, the balancer and Prometheus, after a study on each server and one that was spread over both."""
    with monitored(tmp_path_factory.mktemp("watched"), [probe_repository, probe_repository]) as running:
        front = running.balancer
        tls = TlsSettings(ca=front.certificates.ca)
        for address, how in [(server.grpc_address, None) for server in running.servers] + [(front.grpc_address, tls)]:
            with connect(address, tls=how) as transport:
                analyse(study_of(40), transport, Decoder([True] * 20 + [False] * 20), QUICK)
        yield running


@pytest.mark.triton
def test_three_studies_are_three_scans(watched: Monitored) -> None:
    """Each study counts once, whether one server saw all of it or each a part, and no alert comes of it."""
    seen = 'sum(groundglass_scans_total{verdict="positive"})'
    wait_until(lambda: [series["value"][1] for series in watched.prometheus.query(seen)] == ["3"], "three scans")
    parts = watched.prometheus.query("sum(groundglass_open_studies)")
    assert float(parts[0]["value"][1]) == 2  # the parts of the study that was spread, until they are old
    assert watched.prometheus.alerts() == watched.prometheus.alerts("pending") == []


@pytest.mark.triton
@pytest.mark.parametrize("expression", QUERIES)
def test_a_panel_has_data_after_a_study(watched: Monitored, expression: str) -> None:
    """Every query of the dashboard finds a number, those about a GPU aside, which there is none of."""
    if metrics_of(expression) & GPU_ONLY:
        assert watched.prometheus.query_range(expression) == []
        return

    def numbers() -> list[str]:
        return [value for series in watched.prometheus.query_range(expression) for _, value in series["values"]]

    wait_until(numbers, f"data of {expression}")
    assert "NaN" not in numbers()


@pytest.mark.triton
def test_the_ratios_are_ratios(watched: Monitored) -> None:
    """Serving efficiency and the share of failures lie between 0 and 1; the balancer has both replicas."""
    for ratio in ("instance:groundglass_efficiency:ratio1m", "instance:groundglass_errors:ratio5m"):
        series = watched.prometheus.query_range(ratio)
        values = [float(value) for one in series for _, value in one["values"]]
        assert values, ratio
        assert 0 <= min(values) <= max(values) <= 1.05, ratio  # counters are read at other moments than they change
    busy = watched.prometheus.query_range("instance:groundglass_efficiency:ratio1m > 0")
    assert len(busy) == 2
    assert watched.prometheus.query('haproxy_backend_active_servers{proxy="triton"}')[0]["value"][1] == "2"


@pytest.mark.triton
def test_every_metric_that_is_asked_for_exists(watched: Monitored) -> None:
    """Rules and panels name what servers, balancer and recording rules have; GPU metrics are the exception."""
    asked = {
        name
        for expression in [rule["expr"] for rule in all_rules()] + [query.values[0] for query in QUERIES]
        for name in metrics_of(str(expression))
    }
    known = set(watched.prometheus.get("label/__name__/values"))
    assert asked - known == GPU_ONLY


@pytest.mark.triton
def test_no_key_of_a_study_reaches_the_metrics(watched: Monitored) -> None:
    """The key of a study that was open, then ended, then refused is nowhere with anybody who measures."""
    key = f"planted{uuid.uuid4().hex}"
    for server in watched.servers:
        for rows in (range(3), range(4)):  # left open, then ended
            infer(server.grpc_address, contract.CT_SCAN.name, scan_rows(key.encode(), rows, [True] * 4))
        with pytest.raises(InferenceServerException, match="slice count 5"):
            infer(server.grpc_address, contract.CT_SCAN.name, scan_rows(key.encode(), [0], [True] * 5))
    ended = 'sum(groundglass_scans_total{verdict="negative"})'
    wait_until(lambda: watched.prometheus.query(ended)[0]["value"][1] == "2", "two more scans")
    texts = [watched.balancer.metrics(), json.dumps(watched.prometheus.get("series", **{"match[]": '{__name__!=""}'}))]
    for server in watched.servers:
        with urlopen(f"http://{server.metrics_address}/metrics", timeout=5) as answer:
            texts.append(answer.read().decode())
    assert all("groundglass" in text or "haproxy" in text for text in texts)
    assert not any("planted" in text for text in texts)


@pytest.mark.triton
def test_the_dashboard_can_be_drawn(watched: Monitored, tmp_path: Path) -> None:
    """The script that draws the panels writes a picture, and ends with one line where no Prometheus answers."""
    for address, code in ((watched.prometheus.address, 0), (f"{HOST}:1", 1)):
        out = tmp_path / f"{code}.png"
        command = [sys.executable, str(PLOT), "--prometheus", address, "--minutes", "0.5", "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        assert len(done.stderr.splitlines()) == code
        assert out.exists() == (code == 0)
    width, height = struct.unpack(">II", (tmp_path / "0.png").read_bytes()[16:24])
    assert (width, height) == (1200, 900)


def test_the_dashboard_is_laid_out_without_overlaps() -> None:
    """Every panel has a number, a title, a word of explanation and a place of its own in 24 columns."""
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert sorted(panel["id"] for panel in PANELS) == list(range(1, len(PANELS) + 1))


def test_panels_ask_the_data_source_that_is_provisioned() -> None:
    """The variable's first choice is Prometheus as Grafana is given it, and the list of alerts names it."""
    given = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    folders = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "groundglass.yml").read_text())["providers"]
    variable = DASHBOARD["templating"]["list"][0]
    assert [(one["name"], one["uid"], one["url"]) for one in given] == [
        (variable["current"]["text"], variable["current"]["value"], "http://prometheus:9090")
    ]
    assert folders[0]["options"] == {"path": "/var/lib/grafana/dashboards"}
    lists = [panel for panel in PANELS if panel["type"] == "alertlist"]
    assert [panel["options"]["datasource"] for panel in lists] == [given[0]["name"]]
    sources: list[dict[str, Any]] = [panel["datasource"] for panel in PANELS if panel not in lists]
    assert all(source == {"type": "prometheus", "uid": f"${{{variable['name']}}}"} for source in sources)
