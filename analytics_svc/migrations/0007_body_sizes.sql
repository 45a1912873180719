-- What nobody can ever count, such as a foreign message of 16 MiB, is not kept whole.

ALTER TABLE quarantined_events ADD COLUMN body_size int;
COMMENT ON COLUMN quarantined_events.body IS 'As it arrived, byte for byte; of a large one the beginning.';
COMMENT ON COLUMN quarantined_events.body_size IS
    'Bytes of the whole body as it arrived; NULL: those of the body that is here.';
