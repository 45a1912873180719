-- What an administrator does once on a PostgreSQL server, before the migrations run. Change the passwords.
--
-- The owners run the migrations, which create the group roles that the processes act as; they may create roles for
-- that. Where that is not wanted, create the groups here, too:
--   CREATE ROLE purchases_service NOLOGIN ADMIN purchases_owner;
--   CREATE ROLE purchases_relay NOLOGIN ADMIN purchases_owner;
--   CREATE ROLE analytics_consumer NOLOGIN ADMIN analytics_owner;
--   CREATE ROLE analytics_server NOLOGIN ADMIN analytics_owner;

CREATE ROLE purchases_owner LOGIN CREATEROLE PASSWORD 'local';
CREATE ROLE analytics_owner LOGIN CREATEROLE PASSWORD 'local';
CREATE DATABASE purchases OWNER purchases_owner;
CREATE DATABASE analytics OWNER analytics_owner;

-- After the migrations, better than one login for everything: a login for each process, in its one group.
--   CREATE ROLE relay LOGIN PASSWORD '…' IN ROLE purchases_relay;
