"""What lies in deploy/ is what the code understands."""

from pathlib import Path

import pytest
import yaml
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from cluster.cli import _parser
from cluster.config import parse_settings
from cluster.on_ray.app import build
from experts.errors import InvalidInput

DEPLOY = Path(__file__).parents[2] / "deploy"


def read(name: str) -> dict[str, object]:
    return yaml.safe_load((DEPLOY / name).read_text())


def test_the_serve_yaml_is_one_that_serve_accepts_and_we_can_build() -> None:
    schema = ServeDeploySchema.model_validate(read("serve.yaml"))
    app_schema = schema.applications[0]
    assert app_schema.import_path == "cluster.on_ray.app:build"
    settings = parse_settings(app_schema.args)
    assert schema.proxy_location == "Disabled", "clients connect to the ingresses"
    app = build(app_schema.args)
    assert isinstance(app, Application)
    ingress = app._bound_deployment
    router = ingress.init_args[1]._bound_deployment
    assert (ingress.name, router.name) == ("Ingress", "Router")
    assert ingress.num_replicas == settings.ingresses
    assert router.num_replicas == settings.routers
    assert router.ray_actor_options["num_cpus"] == ingress.ray_actor_options["num_cpus"] == 0


def test_bad_args_are_named_at_deploy_time() -> None:
    with pytest.raises(InvalidInput) as caught:
        build({"model_dir": "/m", "hosts": "many"})
    assert caught.value.field == "hosts"


def test_the_ray_cluster_yaml_is_one_that_ray_up_accepts() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read("ray-cluster.yaml")
    validate_config(prepare_config(config))
    assert "RAY_UP_enable_autoscaler_v2=0" in (DEPLOY / "ray-cluster.yaml").read_text()


def test_every_flag_of_the_port_table_exists() -> None:
    text = (DEPLOY / "README.md").read_text()
    help_of_serve = _parser("0")._subparsers._group_actions[0].choices["serve"].format_help()
    for flag in (
        "--host-ports",
        "--host-bind",
        "--host-advertise",
        "--router-ports",
        "--control-port",
        "--metrics-ports",
    ):
        assert flag in text
        assert flag in help_of_serve
