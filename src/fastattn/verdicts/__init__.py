"""What a tuning found, and the files that keep it: `Verdict`, `Store`, and a manifest that ranks share."""
