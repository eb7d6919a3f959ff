"""Values that every part of Groundglass shares: contract, study, finding, report, errors."""
