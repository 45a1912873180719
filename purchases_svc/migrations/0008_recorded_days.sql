-- On which business days something was recorded since somebody looked last, by the purchases themselves.

-- An answer names where it ends by a transaction id: what has a lower one and was not visible never will be. That means
-- nothing in another realm, nor on a server that was set back and hands out its ids a second time.
CREATE TABLE recorded_days_listing (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    realm text NOT NULL DEFAULT '',
    given_xid xid8 NOT NULL DEFAULT '0'
) WITH (fillfactor = 10);
COMMENT ON COLUMN recorded_days_listing.given_xid IS 'The highest that was given out, in realm. It was committed before '
    'anybody got it: a higher one is of a future that was lost.';
INSERT INTO recorded_days_listing DEFAULT VALUES;
GRANT SELECT, UPDATE (realm, given_xid) ON recorded_days_listing TO purchases_service;
