"""Contracts for import-linter that its own kinds cannot say: who alone may import what, by name patterns."""

from __future__ import annotations

from fnmatch import fnmatchcase

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class OnlyContract(Contract):
    """Only modules that match one of `importers` import `packages` directly (fnmatch patterns)."""

    packages = fields.ListField(subfield=fields.StringField())
    importers = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        wrong = [
            f"{importer} imports {package}"
            for package in self.packages
            if package in graph.modules
            for importer in sorted(graph.find_modules_that_directly_import(package))
            if not any(fnmatchcase(importer, pattern) for pattern in self.importers)
        ]
        return ContractCheck(kept=not wrong, metadata={"wrong": wrong})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for line in check.metadata["wrong"]:
            output.print_error(line)


class PureContract(Contract):
    """Modules that match `modules` import none of `forbidden` directly, and nothing of ours outside `ours`."""

    modules = fields.ListField(subfield=fields.StringField())
    forbidden = fields.ListField(subfield=fields.StringField())
    ours = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        wrong = []
        for module in sorted(graph.modules):
            if any(fnmatchcase(module, pattern) for pattern in self.modules):
                for imported in sorted(graph.find_modules_directly_imported_by(module)):
                    if not self._may_import(imported):
                        wrong.append(f"{module} imports {imported}")
        return ContractCheck(kept=not wrong, metadata={"wrong": wrong})

    def _may_import(self, imported: str) -> bool:
        root = imported.split(".")[0]
        if root in ("cluster", "experts", "router"):
            return any(fnmatchcase(imported, pattern) for pattern in self.ours)
        return root not in self.forbidden

    def render_broken_contract(self, check: ContractCheck) -> None:
        for line in check.metadata["wrong"]:
            output.print_error(line)
