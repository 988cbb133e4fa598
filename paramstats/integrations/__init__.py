"""Callbacks for trainers that have their own training loop.

`paramstats.integrations.lightning` and `paramstats.integrations.transformers` each have a
`ParamStatsCallback`. Import the module that you need; it imports its trainer.
"""
