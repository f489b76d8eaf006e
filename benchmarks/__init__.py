"""Speed against named peers, in the same run, beside the limit of the machine."""
