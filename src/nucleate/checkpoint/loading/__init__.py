"""Loading: what goes where is planned for the whole state, and then read."""

from nucleate.checkpoint.loading.binding import bound, defers
from nucleate.checkpoint.loading.report import Finding, LoadReport
from nucleate.checkpoint.loading.stored_form import StoredForm, Taken

__all__ = ["Finding", "LoadReport", "StoredForm", "Taken", "bound", "defers"]
