"""The formats that underlay brings along. Each registers as a stranger's would."""
