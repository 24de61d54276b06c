"""Selective scan: the state-space recurrence of Mamba, forward and backward."""
