"""The comparison of layouts: designed before it runs, recorded as it runs, summarised from the record alone."""
