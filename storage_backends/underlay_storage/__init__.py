"""The storages that underlay brings along. Each registers as a stranger's would."""
