"""Questions with right answers: lm-eval and the needle."""
