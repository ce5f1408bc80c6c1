"""dbeta: pre-train and use D-BETA, a model that learns 12-lead ECGs and their reports together."""

__version__ = "0.1.0"


def __getattr__(name: str):
    # Lazy: `dbeta --help` and the data commands must not wait for torch.
    if name == "DBeta":
        from dbeta.models.dbeta import DBeta

        return DBeta
    if name == "read_ecg":
        from dbeta.data.records import read_ecg

        return read_ecg
    raise AttributeError(f"module 'dbeta' has no attribute {name!r}")
