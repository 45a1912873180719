#!/usr/bin/env bash
# Renders the overlays of deploy/kubernetes with kustomize, and validates what comes out against Kubernetes' own schemas,
# without a cluster. Kustomize is the one on the PATH, or built with Go; what it keeps is in .local/kubernetes.
set -euo pipefail
cd "$(dirname "$0")/.."
home=$PWD/.local/kubernetes
kustomize=$(command -v kustomize || true)
(umask 077 && mkdir -p .local)
mkdir -p "$home"

if [ -z "$kustomize" ]; then
  kustomize=$home/bin/kustomize
  if [ ! -x "$kustomize" ]; then
    command -v go >/dev/null || { echo "The manifests are not rendered: there is neither kustomize nor go."; exit 1; }
    GOBIN=$home/bin go install sigs.k8s.io/kustomize/kustomize/v5@v5.7.1
  fi
fi
for overlay in single-node production two-cells; do
  printf '\033[1m%s\033[0m\n' "$overlay"
  "$kustomize" build "deploy/kubernetes/$overlay" >"$home/$overlay.yaml"
  # What cert-manager brings is no part of Kubernetes, and has no schema here.
  .venv/bin/python - "$home/$overlay.yaml" "$home/$overlay-own.yaml" <<'END'
import sys
import yaml
own = [it for it in yaml.safe_load_all(open(sys.argv[1])) if "cert-manager" not in it["apiVersion"]]
yaml.safe_dump_all(own, open(sys.argv[2], "w"))
END
  .venv/bin/uv tool run --quiet --from kubernetes-validate==1.37.0 kubernetes-validate --strict "$home/$overlay-own.yaml"
done
echo 'The manifests are well.'
