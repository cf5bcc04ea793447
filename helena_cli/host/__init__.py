"""The machine: processes, services, signals and the metrics port."""
