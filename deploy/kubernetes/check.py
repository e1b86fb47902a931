#!/usr/bin/env python3
"""Renders the Kubernetes manifests as `kubectl apply -k` would, and checks the result; needs no cluster.

Owns what a schema cannot say: that names, ports, labels and settings fit together, that pods have the least rights and
no secret in their environment, and who may reach whom. scripts/check-deploy runs it. Prints a JSON object with the lists
`problems` and `unchecked`. Without the packages of deploy/requirements.txt, it says which checks it left out.
"""
import copy, ipaddress, itertools, json, os, pathlib, re, shutil, subprocess, sys, tempfile

import yaml

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# The oldest Kubernetes that the manifests promise to work on (docs/deploy.md), and the newest one that the package knows.
VERSIONS = ("1.27", "1.37")
# Who may open a connection to whom, and to nobody else. In the first overlay the database is in the cluster, in the
# second it is an address. The broker's own policy restricts only who may reach it.
REACHES = {
    "minimal": {
        ("controller", "ingress", 8080), ("prometheus", "ingress", 8080), ("prometheus", "worker", 9090),
        ("ingress", "nats", 4222), ("worker", "nats", 4222), ("worker", "postgres", 5432), ("migrate", "postgres", 5432),
        ("worker", "internet", 443), ("ingress", "dns", 53), ("worker", "dns", 53), ("migrate", "dns", 53)},
    "broker": {("ingress", "nats", 4222), ("worker", "nats", 4222), ("subscriber", "nats", 4222), ("prometheus", "nats", 7777),
               ("nats", "nats", 6222), ("nats-box", "nats", 4222), ("nats-box", "nats", 6222)},
}
REACHES["tracing"] = REACHES["minimal"] | {("ingress", "collector", 4318), ("worker", "collector", 4318)}
REACHES["production"] = {(a, "10.20.30.4" if b == "postgres" else b, port) for a, b, port in REACHES["minimal"]}
# How long a supervisor waits (docs/operating.md), in seconds: the programs stop within 28.
STOP_WAIT = 30
# Where the workloads find their Secret, whose keys are the names of the files.
SECRETS = pathlib.PurePosixPath("/run/secrets/litestripe")
# Components that no overlay has. Each is checked with the base alone.
OPTIONAL = ("tracing",)
PORTS = (53, 443, 4222, 4317, 4318, 5432, 6222, 7777, 8080, 8222, 9090)
PEERS = {
    "controller": {"namespace": "ingress-nginx", "labels": {}},
    "prometheus": {"namespace": "monitoring", "labels": {"app.kubernetes.io/name": "prometheus"}},
    "collector": {"namespace": "monitoring", "labels": {"app.kubernetes.io/name": "opentelemetry-collector"}},
    "nats": {"namespace": "nats", "labels": {"app.kubernetes.io/name": "nats"}},
    "nats-box": {"namespace": "nats", "labels": {"app.kubernetes.io/name": "nats", "app.kubernetes.io/component": "nats-box"}},
    "postgres": {"namespace": "postgres", "labels": {}},
    "dns": {"namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}},
    "subscriber": {"namespace": "shop", "labels": {"litestripe/subscriber": "true"}},
    "stranger": {"namespace": "shop", "labels": {}},
    **{component: {"namespace": "litestripe", "labels": {"app.kubernetes.io/name": "litestripe", "app.kubernetes.io/component": component}}
       for component in ("ingress", "worker", "migrate")},
    **{address: {"address": address} for address in ("169.254.169.254", "10.20.30.4")},
    "internet": {"address": "198.51.100.7"},
}
problems, unchecked = [], []


def render(where, folder):
    beside = str(pathlib.Path(sys.executable).parent)
    path = os.pathsep.join((beside, os.environ.get("PATH", "")))
    kustomize, kubectl = shutil.which("kustomize", path=path), shutil.which("kubectl", path=path)
    if not (kustomize or kubectl):
        return None
    command = [kustomize, "build"] if kustomize else [kubectl, "kustomize"]
    found = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    if found.returncode:
        problems.append(f"{where}: {found.stderr.strip()}")
        return []
    return [document for document in yaml.safe_load_all(found.stdout) if document]


def render_component(where, folder):
    """Renders a component with the base: it is a change of other resources, and nothing alone."""
    with tempfile.TemporaryDirectory() as overlay:
        base, *components = (os.path.relpath(path, os.path.realpath(overlay)) for path in (HERE / "base", HERE / "components/namespace", folder))
        parts = {"resources": [base], "components": components, "namespace": "litestripe"}
        pathlib.Path(overlay, "kustomization.yaml").write_text(yaml.safe_dump(parts))
        return render(where, overlay)


def closed(schema):
    """Returns the schema with unknown fields forbidden, as the API server reports them."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict):
        schema.setdefault("additionalProperties", False)
    return schema


def check_schema(where, document):
    kind, api = document["kind"], document["apiVersion"]
    if api.split("/")[0] in ("keda.sh", "monitoring.coreos.com"):
        return check_custom_schema(where, document)
    try:
        import kubernetes_validate
    except ImportError:
        return unchecked.append("Kubernetes' schemas (no kubernetes-validate)")
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except Exception as error:  # The package has no common class for its errors.
            problems.append(f"{where}: against {kind} of Kubernetes {version}: {str(error).splitlines()[0] or type(error).__name__}")


def check_custom_schema(where, document):
    try:
        import jsonschema
        if document["apiVersion"] == "keda.sh/v1alpha1":
            from cloudcoil.models.keda import v1alpha1 as models
        else:
            from cloudcoil.models.prometheus_operator import v1 as models
    except ImportError:
        return unchecked.append(f"the schema of {document['kind']} (no cloudcoil models)")
    schema = closed(getattr(models, document["kind"]).model_json_schema(by_alias=True))
    for error in jsonschema.Draft202012Validator(schema).iter_errors(document):
        problems.append(f"{where}: {'.'.join(map(str, error.path))}: {error.message[:200]}")


def pod_of(document):
    return document["spec"]["template"] if document["kind"] in ("Deployment", "Job") else None


def matches(selector, labels):
    if selector is None:
        return False
    expressions = selector.get("matchExpressions", [])
    if any(expression["operator"] != "In" for expression in expressions):
        raise NotImplementedError("a selector with another operator than In")
    return (all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
            and all(labels.get(expression["key"]) in expression["values"] for expression in expressions))


def secrets_of(settings):
    """Returns the settings that are secrets: those that a file may replace, and one that has no file."""
    return {name for name in settings if f"{name}_FILE" in settings} | {"OTEL_EXPORTER_OTLP_TRACES_HEADERS"}


def check_secrets(where, spec, container, documents, secrets):
    """No secret is in the container's environment, and each file of one that a setting names is mounted."""
    maps = {document["metadata"]["name"]: document.get("data", {}) for document in documents if document["kind"] == "ConfigMap"}
    sources, variables = container.get("envFrom", []), container.get("env", [])
    chosen = [maps.get(source["configMapRef"]["name"], {}) for source in sources if "configMapRef" in source]
    given = dict(itertools.chain.from_iterable(each.items() for each in chosen)) | {variable["name"]: variable.get("value", "") for variable in variables}
    shown = {variable["name"] for variable in variables if "secretKeyRef" in variable.get("valueFrom", {})}
    shown |= {name for name in secrets if given.get(name)} | {name for name, value in given.items() if re.search("//[^/]+@", value)}
    shown |= {source["secretRef"]["name"] for source in sources if "secretRef" in source}
    problems.extend(f"{where}: has the secret {name} in its environment, not in a file" for name in sorted(shown))
    volumes = {volume["name"]: volume["secret"] for volume in spec.get("volumes", []) if "secret" in volume}
    mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts", []) if mount["name"] in volumes}
    for mount in mounts.values():
        volume = volumes[mount["name"]]
        rules = {"is not read-only": mount.get("readOnly") is not True,
                 "would not follow a change of the Secret": "subPath" in mount,
                 "is open to other users": volume.get("defaultMode") not in (0o400, 0o440) or any("mode" in item for item in volume.get("items", [])),
                 "cannot be read by the program": not spec.get("securityContext", {}).get("fsGroup")}
        problems.extend(f"{where}: the mount of the Secret {volume['secretName']} {rule}" for rule, broken in rules.items() if broken)
    for name, value in sorted(given.items()):
        if name.removesuffix("_FILE") in secrets and name.endswith("_FILE") and value:
            mount = mounts.get(str(pathlib.PurePosixPath(value).parent))
            keys = [item["path"] for item in volumes[mount["name"]].get("items", [])] if mount else []
            if not mount or keys and pathlib.PurePosixPath(value).name not in keys:
                problems.append(f"{where}: {name} names {value}, which is not mounted")


def check_env_files(settings):
    """The files of settings hold no secret, not even in a comment, and docs/deploy.md makes a Secret of what they name."""
    made = set(re.findall(r"--from-file=([a-z-]+)", (ROOT / "docs/deploy.md").read_text()))
    for path in sorted(HERE.glob("**/*.env")):
        for name, value in re.findall(r"^#?([A-Z][A-Z0-9_]+)=(.*)$", path.read_text(), re.M):
            here = f"{path.relative_to(ROOT)}: {name}"
            file = pathlib.PurePosixPath(value)
            is_file = name.removesuffix("_FILE") in secrets_of(settings) and name.endswith("_FILE")
            rules = {"is no setting": name not in settings, "is a secret": name in secrets_of(settings),
                     f"names {value}, which is not below {SECRETS}": is_file and file.parent != SECRETS,
                     f"names {value}, for which docs/deploy.md makes no key of a Secret": is_file and file.name not in made}
            problems.extend(f"{here} {rule}" for rule, broken in rules.items() if broken)


def check_pod(where, document, documents, settings):
    pod, spec = pod_of(document), pod_of(document)["spec"]
    # Kubernetes counts from before the hook, which only sleeps.
    hooks = [container.get("lifecycle", {}).get("preStop", {}) for container in spec["containers"]]
    grace = spec.get("terminationGracePeriodSeconds", 30) - max(int(hook["exec"]["command"][-1]) if hook else 0 for hook in hooks)
    security = spec.get("securityContext", {})
    rules = {
        "may run as root": security.get("runAsNonRoot") is not True or not security.get("runAsUser"),
        "has no seccomp profile": security.get("seccompProfile", {}).get("type") != "RuntimeDefault",
        "gets a token for the API server": spec.get("automountServiceAccountToken") is not False,
        "gets service links in its environment": spec.get("enableServiceLinks") is not False,
        f"is killed less than {STOP_WAIT} s after SIGTERM": grace < STOP_WAIT,
    }
    problems.extend(f"{where}: {rule}" for rule, broken in rules.items() if broken)
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for container in spec.get("initContainers", []) + spec["containers"]:
        if container["name"] == "schema":
            check_schema_wait(f"{where} schema", container)
        rights, runs = container.get("securityContext", {}), document["kind"] == "Deployment" and container in spec["containers"]
        ports = {port["name"] for port in container.get("ports", [])}
        probes = [container.get(probe, {}).get("httpGet", {}) for probe in ("startupProbe", "livenessProbe", "readinessProbe")]
        rules = {
            "can gain privileges": rights.get("allowPrivilegeEscalation") is not False,
            "can write to its image": rights.get("readOnlyRootFilesystem") is not True,
            "keeps capabilities": rights.get("capabilities", {}).get("drop") != ["ALL"],
            "has no limit of memory": "memory" not in container.get("resources", {}).get("limits", {}),
            "asks for no CPU or memory": {"cpu", "memory"} - container.get("resources", {}).get("requests", {}).keys(),
            "mounts a volume that is missing": {mount["name"] for mount in container.get("volumeMounts", [])} - volumes,
            "lacks a probe": runs and [probe.get("path") for probe in probes] != ["/healthz", "/healthz", "/readyz"],
            "has a probe of a port that it does not name": runs and not {probe.get("port") for probe in probes} <= ports,
        }
        name = f"{where} {container['name']}"
        problems.extend(f"{name}: {rule}" for rule, broken in rules.items() if broken)
        names = {variable["name"] for variable in container.get("env", [])}
        problems.extend(f"{name}: {unknown} is no setting" for unknown in sorted(names - settings))
        check_secrets(name, spec, container, documents, secrets_of(settings))
    if spec.get("topologySpreadConstraints") and not all(
            matches(constraint["labelSelector"], pod["metadata"]["labels"]) for constraint in spec["topologySpreadConstraints"]):
        problems.append(f"{where}: spreads other pods than its own")


def check_schema_wait(where, container):
    """The init container waits as long as a step is pending, says for what, and fails if nobody can tell."""
    answers = ['[{"applied":false}]', '[{"applied": false}]', '[{"applied":true}]']
    for last, status in ((answers[-1], 0), ("", 1)):
        with tempfile.TemporaryDirectory() as folder:
            for number, answer in enumerate([*answers[:-1], last]):
                pathlib.Path(folder, str(number)).write_text(answer)
            # Each call takes the next answer. Nothing sleeps.
            for name, script in (("sleep", "exit 0"), ("litestripe-worker", f'cd {folder} && set -- [0-9] && cat "$1" && [ -s "$1" ] && rm "$1"')):
                pathlib.Path(folder, name).write_text(f"#!/bin/sh\n{script}\n")
                pathlib.Path(folder, name).chmod(0o755)
            found = subprocess.run(container["command"], env=os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}, capture_output=True, text=True)
            if found.returncode != status or found.stderr.count("litestripe-migrate") != 1:
                problems.append(f"{where}: ends with {found.returncode} instead of {status}, and says {found.stderr!r}")


def check_references(where, documents, settings):
    named = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    pods = [pod_of(document)["metadata"]["labels"] for document in documents if pod_of(document)]
    for document in documents:
        kind, name, spec = document["kind"], document["metadata"]["name"], document.get("spec", {})
        here = f"{where} {kind} {name}"
        selector = {"Service": {"matchLabels": spec.get("selector", {})}, "NetworkPolicy": spec.get("podSelector")}.get(kind, spec.get("selector"))
        if kind in ("Service", "NetworkPolicy", "PodDisruptionBudget", "PodMonitor", "Deployment") and not any(matches(selector, labels) for labels in pods):
            problems.append(f"{here}: selects no pod")
        if kind == "ConfigMap":
            problems.extend(f"{here}: {unknown} is no setting" for unknown in sorted(document["data"].keys() - settings))
            if "NATS_URL" in document["data"] and not document["data"].get("LITESTRIPE_EVENTS_MAX_BYTES"):
                problems.append(f"{here}: without LITESTRIPE_EVENTS_MAX_BYTES, STRIPE_EVENTS may leave no room for the workers' streams")
        if kind == "ScaledObject":
            target = named.get(("Deployment", spec["scaleTargetRef"]["name"]))
            if not target or "replicas" in target["spec"]:
                problems.append(f"{here}: its Deployment is missing or has a number of replicas, which would be set back at each apply")
        if kind == "Ingress":
            for path in itertools.chain.from_iterable(rule["http"]["paths"] for rule in spec["rules"]):
                service = named.get(("Service", path["backend"]["service"]["name"]))
                ports = {port["name"] for port in service["spec"]["ports"]} if service else set()
                if path["path"] != "/ls/hook/" or path["backend"]["service"]["port"]["name"] not in ports:
                    problems.append(f"{here}: passes on something else than the hook, or to no service")
        if pod_of(document):
            account = pod_of(document)["spec"]["serviceAccountName"]
            maps = [source["configMapRef"]["name"] for container in pod_of(document)["spec"]["containers"] for source in container["envFrom"] if "configMapRef" in source]
            missing = [("ServiceAccount", account)] * (("ServiceAccount", account) not in named)
            missing += [("ConfigMap", each) for each in maps if ("ConfigMap", each) not in named]
            problems.extend(f"{here}: {kind} {each} is missing" for kind, each in missing)


def allows(policy, direction, peer, port, ports):
    """Whether a rule of `policy` allows a connection with `peer`; `ports` are the pod's named ones."""
    for rule in policy["spec"].get(direction, []):
        if "ports" in rule and port not in {ports.get(entry["port"], entry["port"]) for entry in rule["ports"]}:
            continue
        for entry in rule["from" if direction == "ingress" else "to"]:
            if "ipBlock" in entry and "address" in peer:
                address, block = ipaddress.ip_address(peer["address"]), entry["ipBlock"]
                if address in ipaddress.ip_network(block["cidr"]) and not any(
                        address in ipaddress.ip_network(cidr) for cidr in block.get("except", [])):
                    return True
            if "ipBlock" not in entry and "labels" in peer:
                namespace = {"matchLabels": {"kubernetes.io/metadata.name": policy["metadata"]["namespace"]}}
                namespace = entry.get("namespaceSelector", namespace)
                if matches(namespace, {"kubernetes.io/metadata.name": peer["namespace"]}) and matches(entry.get("podSelector", {}), peer["labels"]):
                    return True
    return False


def check_reach(where, documents, expected):
    """Works out from the policies who may reach whom, and compares it with `expected`."""
    policies = [document for document in documents if document["kind"] == "NetworkPolicy"]
    ports = {port["name"]: port["containerPort"] for document in documents if pod_of(document)
             for container in pod_of(document)["spec"]["containers"] for port in container.get("ports", [])}

    def restricting(name, side):
        return [policy for policy in policies if side in policy["spec"]["policyTypes"] and "labels" in PEERS[name]
                and policy["metadata"]["namespace"] == PEERS[name]["namespace"]
                and matches(policy["spec"]["podSelector"], PEERS[name]["labels"])]

    found = set()
    for source, target in itertools.product(PEERS, PEERS.keys() - {"nats-box"}):  # It listens on nothing.
        sides = [("egress", PEERS[target], restricting(source, "Egress")), ("ingress", PEERS[source], restricting(target, "Ingress"))]
        sides = [(side, peer, policies) for side, peer, policies in sides if policies]
        found |= {(source, target, port) for port in PORTS if sides
                  and all(any(allows(policy, side, peer, port, ports) for policy in policies) for side, peer, policies in sides)}
    for document in filter(pod_of, documents):
        name = pod_of(document)["metadata"]["labels"]["app.kubernetes.io/component"]
        problems.extend(f"{where}: nothing restricts the {side} of {name}" for side in ("Ingress", "Egress") if not restricting(name, side))
    problems.extend(f"{where}: {source} may reach {target}:{port}" for source, target, port in sorted(found - expected))
    problems.extend(f"{where}: {source} cannot reach {target}:{port}" for source, target, port in sorted(expected - found))


def check_rules():
    """The rules in the manifest are those of deploy/prometheus/rules.yml, indented."""
    source, target = ROOT / "deploy/prometheus/rules.yml", HERE / "components/monitoring/prometheus-rule.yaml"
    if not source.exists():
        return unchecked.append(f"{target.relative_to(ROOT)} (no {source.relative_to(ROOT)})")
    text = source.read_text()
    wanted = f"""# Made from deploy/prometheus/rules.yml by: scripts/check-deploy --write
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: litestripe
  labels: {{ app.kubernetes.io/name: litestripe }}
spec:
""" + "".join(f"  {line}\n" if line else "\n" for line in text[re.search("^groups:", text, re.M).start():].splitlines())
    if "--write" in sys.argv:
        target.write_text(wanted)
    elif not target.exists() or target.read_text() != wanted:
        problems.append(f"{target.relative_to(ROOT)}: differs from {source.relative_to(ROOT)}: run scripts/check-deploy --write")


def check_collector(where, documents):
    """The collector that the settings name is the one that the policy lets the programs reach."""
    shared = [document["data"] for document in documents if document["kind"] == "ConfigMap" and "NATS_URL" in document["data"]]
    service = rf"http://[a-z-]+\.{PEERS['collector']['namespace']}\.svc:4318"
    if [bool(re.fullmatch(service, data.get("OTEL_EXPORTER_OTLP_ENDPOINT", ""))) for data in shared] != [True]:
        problems.append(f"{where}: the programs' settings name no collector that they may reach")


def check_metrics():
    """Says which of the metrics that decide the number of workers no program serves yet."""
    text = (HERE / "components/autoscaling/scaled-object.yaml").read_text()
    sources = "".join(path.read_text() for program in ("ingress", "worker") for path in (ROOT / program / "src").glob("**/metrics*.rs"))
    for name in sorted(set(re.findall(r"\blitestripe_\w+", text))):
        if name not in sources:
            unchecked.append(f"deploy/kubernetes/components/autoscaling (no program serves {name} yet)")


def main():
    check_rules()
    check_metrics()
    example = (ROOT / ".env.example").read_text()
    settings = set(re.findall(r"^(?:# )?([A-Z][A-Z0-9_]+)=", example, re.M))
    check_env_files(settings)
    overlays = sorted((HERE / "overlays").iterdir())
    used = {pathlib.PurePath(each).name for overlay in overlays
            for each in yaml.safe_load((overlay / "kustomization.yaml").read_text()).get("components", [])}
    components = {component.name: component for component in (HERE / "components").iterdir()}
    problems.extend(f"deploy/kubernetes/components/{name}: is not checked" for name in sorted(components.keys() - used - set(OPTIONAL)))
    for folder in [HERE / "base", HERE / "broker", *overlays, *map(components.__getitem__, OPTIONAL)]:
        where = str(folder.relative_to(ROOT))
        documents = (render_component if folder.name in OPTIONAL else render)(where, folder)
        if documents is None:
            unchecked.append("the Kubernetes manifests (no kustomize or kubectl)")
            break
        for document in documents:
            check_schema(f"{where} {document['kind']} {document['metadata']['name']}", copy.deepcopy(document))
            if pod_of(document):
                check_pod(f"{where} {document['kind']} {document['metadata']['name']}", document, documents, settings)
        if folder.name != "broker":
            check_references(where, documents, settings)
        if folder.name == "tracing":
            check_collector(where, documents)
        if folder.name in REACHES:
            check_reach(where, documents, REACHES[folder.name])
    json.dump({"problems": problems, "unchecked": sorted(set(unchecked))}, sys.stdout)


main()
