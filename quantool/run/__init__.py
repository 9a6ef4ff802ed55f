"""The work of a run: the plan with its source fetched, artifacts made, artifacts judged, one stage by itself."""
