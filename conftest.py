"""Settings for this repository's own suites."""

collect_ignore_glob = [".venv*/*"]
