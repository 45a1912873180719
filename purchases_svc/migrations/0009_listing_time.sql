-- Nobody reads when the reader of committed events was last heard. Relays of the release before still write it, so the
-- column goes with the next one.
COMMENT ON COLUMN outbox_listing.received_at IS 'Not used any more.';
