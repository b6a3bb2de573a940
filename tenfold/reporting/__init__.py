"""Tables, pages and charts of plans, profiles and runs, from records only: no model, no torch."""

from tenfold.reporting.plan_tables import plan_tables
from tenfold.reporting.profile_tables import profile_tables
from tenfold.reporting.run_tables import cost_table, record_tables
from tenfold.reporting.text import as_text, render_outcome, render_plan, render_profile, render_record

__all__ = [
    "as_text",
    "cost_table",
    "plan_tables",
    "profile_tables",
    "record_tables",
    "render_outcome",
    "render_plan",
    "render_profile",
    "render_record",
]
