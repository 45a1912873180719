"""The system under fire: tills with a ledger, faults by the hundred, and a checker that counts every cent."""
