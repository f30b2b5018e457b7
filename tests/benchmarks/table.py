"""How all benchmarks print."""


def row(what: str, figure: str, target: str) -> None:
    """Print one row."""
    print(f"{what:<66} {figure:<44} target {target}", flush=True)
