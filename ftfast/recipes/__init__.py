"""Methods as declarations: which terms on which batch with which weight. One file each."""

from __future__ import annotations

from ftfast.recipes.base import BatchSpec, Context, Features, History, Plan, Recipe, Term, available, get_recipe

__all__ = ["BatchSpec", "Context", "Features", "History", "Plan", "Recipe", "Term", "available", "get_recipe"]
