-- The yardstick: one purchase of three items per transaction, statement by statement, as a plain client would write it.
-- Keys and receipt numbers are random, as clients' are. The ids that we make are UUIDv7, which the partitions need.
-- DAY becomes the day of the run. Times differ: with one time for all, foreign keys may be checked through the index on
-- purchase_time, one by one through all rows, once autovacuum has seen the tables empty.
\set b random(1, 50)
\set c random(1, 500)
\set p random(1, 9000)
select uuidv7() as pid, gen_random_uuid() as ik, uuidv7() as ev, cast(gen_random_uuid() as text) as rid, timestamptz 'DAY 00:00:00Z' + random() * interval '86399 s' as t \gset
begin;
insert into idempotency_keys values (:ik, :pid, :t, :ev);
insert into receipts values (:b, 'POS-3', 'DAY', :rid, :pid, :t);
insert into purchases (purchase_id, receipt_id, idempotency_key, branch_id, cashier_id, pos_id, customer_id, purchase_time, business_day, total_amount, item_count, event_id) values (:pid, :rid, :ik, :b, :c, 'POS-3', null, :t, 'DAY', 142.50, 3, :ev);
insert into purchase_items (purchase_id, purchase_time, product_id, qty, unit_price, line_total) values (:pid, :t, :p, 1, 8.9, 8.9), (:pid, :t, :p + 1, 1, 8.9, 8.9), (:pid, :t, :p + 2, 1, 124.7, 124.7);
insert into outbox_events (event_id, event_type, aggregate_id, occurred_at, payload_json) values (:ev, 'PurchaseCreated', :pid, now(), '{"event_id":"x","event_type":"PurchaseCreated","occurred_at":"2026-01-06T10:15:00Z","purchase":{"purchase_id":"u","receipt_id":"123456","idempotency_key":"u","branch_id":1,"cashier_id":17,"pos_id":"POS-3","purchase_time":"2026-01-06T10:14:59Z","total_amount":142.50,"items":[{"product_id":1001,"qty":1,"unit_price":8.9},{"product_id":2007,"qty":1,"unit_price":124.7}]}}');
commit;
