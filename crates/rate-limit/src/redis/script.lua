-- Charges several limits in one step, all of them or none. Time is the server's, in ticks of 1/16 microsecond since
-- 1,700,000,000: whole numbers that a double holds exactly until the year 2041.
--
-- A key holds "<arrival time>,<now>[;<lease>,<ticks>,<expiry>]...": what was written when, so that a clock that was set
-- back takes everything back with it, and no time passes until it goes on. A lease is withheld from everybody else until it is reported
-- or expires, and only then charged. So no window ever sees more than burst + rate * time: see the store's documentation.
--
-- KEYS may name one key more than once: two limits of one name, or a debt beside a question. It is read and written once.
--
-- ARGV: the life of a lease, then for each key
--   interval, window: of one unit, and how far ahead the arrival time may be
--   units:            to charge now
--   want, batch:      units to lease on top, and how many are worth coming back for
--   old, used:        a lease that is reported, and the ticks used of it ("" and 0 without)
--   new:              the name of the lease to give
--   debt:             ticks to charge whatever comes of it
--   flags:            1: a shadow, which never refuses; 2: nothing is asked, only reported and owed
--   delay:            how much further the arrival time may be, if the request waits until its turn
-- Reply: 1 or 0 for admitted, then for each key the units leased, the ticks the arrival time is ahead of now with all
-- leases, the ticks until coming back makes sense, and 1 if this key would have refused.

local time = redis.call('TIME')
local now = ((tonumber(time[1]) - 1700000000) * 1000000 + tonumber(time[2])) * 16
local life = tonumber(ARGV[1])

local entries, distinct = {}, {}
for i, key in ipairs(KEYS) do
  local at = 1 + (i - 1) * 11
  local entry = entries[key]
  if not entry then
    entry = { arrival = 0, leases = {}, withheld = 0, last = now, reports = {}, debt = 0, charged = 0 }
    entries[key] = entry
    distinct[#distinct + 1] = key
  end
  entry.reports[ARGV[at + 6]] = tonumber(ARGV[at + 7])
  entry.debt = entry.debt + tonumber(ARGV[at + 9])
end

for _, key in ipairs(distinct) do
  local entry = entries[key]
  local state = redis.call('GET', key)
  if state then
    local arrival, written = string.match(state, '^(%d+),(%d+)')
    local back = math.max(0, (tonumber(written) or now) - now)
    entry.arrival = (tonumber(arrival) or 0) - back
    for id, ticks, expiry in string.gmatch(state, ';([^,]+),(%d+),(%d+)') do
      ticks, expiry = tonumber(ticks), tonumber(expiry) - back
      local used = entry.reports[id]
      if used then
        -- Whatever was used was used before now, and before it expired.
        entry.arrival = math.max(entry.arrival, math.min(now, expiry)) + math.min(used, ticks)
      elseif expiry <= now then
        -- Nobody said how much of it was used.
        entry.arrival = math.max(entry.arrival, expiry) + ticks
      else
        entry.leases[#entry.leases + 1] = string.format(';%s,%.0f,%.0f', id, ticks, expiry)
        entry.withheld = entry.withheld + ticks
        entry.last = math.max(entry.last, expiry)
      end
    end
  end
  entry.arrival = math.max(entry.arrival, now) + entry.debt
end

local asks = {}
local admitted = 1
for i, key in ipairs(KEYS) do
  local at = 1 + (i - 1) * 11
  local entry = entries[key]
  local ask = {
    interval = tonumber(ARGV[at + 1]),
    window = tonumber(ARGV[at + 2]),
    cost = tonumber(ARGV[at + 3]) * tonumber(ARGV[at + 1]),
    delay = tonumber(ARGV[at + 11]),
    refuses = 0,
  }
  local flags = tonumber(ARGV[at + 10])
  ask.free = now + ask.window - entry.arrival - entry.charged - entry.withheld
  if flags < 2 and ask.cost > ask.free + ask.delay then
    ask.refuses = 1
    if flags == 0 then
      admitted = 0
    end
  else
    entry.charged = entry.charged + ask.cost
  end
  asks[i] = ask
end

local reply = { admitted }
for i, key in ipairs(KEYS) do
  local at = 1 + (i - 1) * 11
  local ask, entry = asks[i], entries[key]
  local want, batch = tonumber(ARGV[at + 4]), tonumber(ARGV[at + 5])
  local leased, again = 0, 0
  if ask.refuses == 1 then
    again = ask.cost - ask.free - ask.delay + (batch - 1) * ask.interval
  elseif admitted == 1 then
    local free = now + ask.window - entry.arrival - entry.charged - entry.withheld
    -- Half of what is left stays for others, unless it is not worth a way for them.
    local units = math.floor(free / ask.interval)
    leased = math.max(0, math.min(want, math.max(math.floor(units / 2), math.min(units, batch))))
    if leased > 0 then
      local ticks = leased * ask.interval
      entry.leases[#entry.leases + 1] = string.format(';%s,%.0f,%.0f', ARGV[at + 8], ticks, now + life)
      entry.withheld = entry.withheld + ticks
      entry.last = math.max(entry.last, now + life)
      free = free - ticks
    end
    if free + ask.delay < ask.interval then
      again = batch * ask.interval - free - ask.delay
    end
  end
  local charged = admitted == 1 and entry.charged or 0
  reply[#reply + 1] = leased
  reply[#reply + 1] = entry.arrival + charged + entry.withheld - now
  reply[#reply + 1] = again
  reply[#reply + 1] = ask.refuses
end

for _, key in ipairs(distinct) do
  local entry = entries[key]
  if admitted == 1 then
    entry.arrival = entry.arrival + entry.charged
  end
  if entry.arrival + entry.withheld > now then
    local state = string.format('%.0f,%.0f', entry.arrival, now) .. table.concat(entry.leases)
    -- Until everything it says is over, were all leases used as they expire.
    local over = math.max(entry.arrival, entry.last) + entry.withheld - now
    redis.call('SET', key, state, 'PX', string.format('%.0f', math.floor(over / 16000) + 1))
  elseif redis.call('EXISTS', key) == 1 then
    redis.call('DEL', key)
  end
end
return reply
