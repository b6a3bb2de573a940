#!/usr/bin/env bash
# mkdocs: `build --strict` fails on a broken link, `build --strict --quiet` builds the same site and exits with 0.
#
# Strict mode counts the warnings that pass the logger; --quiet raises the level of that logger to ERROR, so that none
# arrives to be counted. A CI job that silences the build silences its own check. Seen with MkDocs 1.6.1.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mkdocs==1.6.1
"$folder/venv/bin/mkdocs" --version

mkdir -p "$folder/site/docs"
printf 'site_name: A site\n' > "$folder/site/mkdocs.yml"
printf '# A page\n\nSee [what is not there](missing.md).\n' > "$folder/site/docs/index.md"
cd "$folder/site"

strict=0
"$folder/venv/bin/mkdocs" build --strict --site-dir "$folder/one" || strict=$?
quiet=0
"$folder/venv/bin/mkdocs" build --strict --quiet --site-dir "$folder/two" || quiet=$?
built=no
[ -f "$folder/two/index.html" ] && built=yes

echo "--strict exits with $strict; --strict --quiet exits with $quiet, site built: $built"
[ "$strict" -eq 1 ] && [ "$quiet" -eq 0 ] && [ "$built" = yes ]
