-- As in 0004, but it looks at what was dropped once it has the lock: before, the month could be dropped while it waited,
-- and be made anew. Its sales, whose keys were gone, could have come in twice.
CREATE OR REPLACE FUNCTION ensure_purchases_month(month date) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = public, pg_temp SET lock_timeout = '1s' SET timezone = 'UTC'
AS $$
DECLARE
    suffix text := to_char(month, 'YYYY_MM');
    next_month date := month + interval '1 month';
    receipts_month date;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('ensure_purchases_month'));
    IF month <> date_trunc('month', month) OR month > now() + interval '1 year'
        OR month < (SELECT coalesce(max(dropped_before), '2000-01-01') FROM chain_settings)
    THEN
        RAISE EXCEPTION 'no purchase can lie in the month %', month USING ERRCODE = 'datetime_field_overflow';
    END IF;
    IF to_regclass('purchases_' || suffix) IS NULL THEN
        EXECUTE format('CREATE TABLE %I (LIKE purchases INCLUDING DEFAULTS INCLUDING CONSTRAINTS)',
            'purchases_' || suffix);
        EXECUTE format('ALTER TABLE purchases ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
            'purchases_' || suffix, month::timestamptz, next_month::timestamptz);
    END IF;
    IF to_regclass('purchase_items_' || suffix) IS NULL THEN
        EXECUTE format('CREATE TABLE %I (LIKE purchase_items INCLUDING DEFAULTS INCLUDING CONSTRAINTS,
            UNIQUE (purchase_id, product_id),
            FOREIGN KEY (purchase_id, purchase_time) REFERENCES %I (purchase_id, purchase_time))',
            'purchase_items_' || suffix, 'purchases_' || suffix);
        EXECUTE format('ALTER TABLE purchase_items ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
            'purchase_items_' || suffix, month::timestamptz, next_month::timestamptz);
    END IF;
    -- At its edges, a month in UTC has business days of the month before or after.
    FOREACH receipts_month IN ARRAY ARRAY[month - interval '1 month', month, next_month]::date[] LOOP
        IF to_regclass('receipts_' || to_char(receipts_month, 'YYYY_MM')) IS NULL THEN
            EXECUTE format('CREATE TABLE %I (LIKE receipts)', 'receipts_' || to_char(receipts_month, 'YYYY_MM'));
            EXECUTE format('ALTER TABLE receipts ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                'receipts_' || to_char(receipts_month, 'YYYY_MM'), receipts_month,
                (receipts_month + interval '1 month')::date);
        END IF;
    END LOOP;
END $$;
