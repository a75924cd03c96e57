"""Loading: a plan says for the whole state where each tensor goes; then the tensors are read."""

from nucleate.checkpoint.loading.binding import bound, defers
from nucleate.checkpoint.loading.report import Finding, LoadReport
from nucleate.checkpoint.loading.stored_form import StoredForm, StoredSources

__all__ = ["Finding", "LoadReport", "StoredForm", "StoredSources", "bound", "defers"]
