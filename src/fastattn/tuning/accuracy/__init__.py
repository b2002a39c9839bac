"""Whether a candidate's numbers are right: data that breaks kernels, attention in float64, the budgets, and the judge."""
