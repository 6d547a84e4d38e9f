"""Which imports may a module not make, when some of the named modules are not written yet?

import-linter's own `forbidden` contract fails on a module that does not exist; this one passes over it.
"""

from __future__ import annotations

from grimp import ImportGraph
from importlinter.contracts.forbidden import ForbiddenContract
from importlinter.domain.contract import ContractCheck
from importlinter.domain.imports import ModuleExpression


class ForbiddenIfPresent(ForbiddenContract):  # type: ignore[misc]
    """`forbidden` over those of our modules that exist; external modules stay as they are."""

    type_name = "forbidden_if_present"

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        our_packages = {name for name in graph.modules if "." not in name and not graph.is_module_squashed(name)}

        def keep_checkable(modules: set[ModuleExpression]) -> set[ModuleExpression]:
            return {
                module
                for module in modules
                if module.has_wildcard_expression()
                or module.expression.split(".")[0] not in our_packages
                or module.expression in graph.modules
            }

        self.source_modules = keep_checkable(self.source_modules)  # type: ignore[has-type]
        self.forbidden_modules = keep_checkable(self.forbidden_modules)  # type: ignore[has-type]
        return super().check(graph, verbose)
