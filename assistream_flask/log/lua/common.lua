-- What the other scripts share: it goes before each of them.
local function last(key)
    local found = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
    if found then
        local epoch, offset = string.match(found[1], '^(%d+)%-(%d+)$')
        return epoch, offset, found[2][3] == 'gone', found[2][3] == 'n' and tonumber(found[2][4])
    end
end
local function now()
    local time = redis.call('TIME')
    return tonumber(time[1]) * 1000000 + tonumber(time[2])
end
-- What a stream takes in bytes, with what is kept beside it, is in one hash, by key, and the sum under ''. A sorted set
-- has for each a time, in ms, at which it was used, or later: who sheds looks whether it was, by when it expires, so that
-- no append has to say so.
local function accounts(key)
    local base = string.match(key, '^%w+:%d+')
    return base .. '-sizes', base .. '-used'
end
-- Put right what the accounts have of a stream, or that it is gone. Not by samples: of a few small nodes and many large
-- ones those would be a tenth.
local function measure(key)
    local sizes, used = accounts(key)
    local size, before = 0, tonumber(redis.call('HGET', sizes, key) or '0')
    for _, one in ipairs({key, key .. ':past'}) do
        size = size + (redis.call('MEMORY', 'USAGE', one, 'SAMPLES', 0) or 0)
    end
    redis.call('HINCRBY', sizes, '', size - before)
    if size > 0 then
        redis.call('HINCRBY', sizes, key, size - before)
        redis.call('ZADD', used, 'NX', math.floor(now() / 1000), key)
    else
        redis.call('HDEL', sizes, key)
        redis.call('ZREM', used, key)
    end
    return size
end
-- What was told is kept for a while beside the stream: who has a run may be gone, and have stored less. The first
-- entry says what it goes on from, and of which runs something is missing before.
local function restart(key, ttl, keep, holes)
    local old, _, gone = last(key)
    if gone then return old end
    local past, told = key .. ':past', {}
    if keep and old then told = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1000) end
    local epoch = now()
    if old and epoch <= tonumber(old) then epoch = tonumber(old) + 1 end
    epoch = string.format('%.0f', epoch)
    redis.call('DEL', key)
    if #told > 0 then
        redis.call('XADD', key, epoch .. '-0', 'e', '', 'from', old, 'holes', holes or '')
        for n = #told, 1, -1 do
            redis.call('XADD', past, 'MAXLEN', '=', 2000, told[n][1], unpack(told[n][2]))
        end
        redis.call('PEXPIRE', past, 60000)
    else
        redis.call('XADD', key, epoch .. '-0', 'e', '')
        redis.call('DEL', past)
    end
    redis.call('PEXPIRE', key, ttl)
    measure(key)
    redis.call('PUBLISH', key, epoch .. '-1')
    return epoch
end
local function is_kept(key, is_last_resort)
    if redis.call('PUBSUB', 'NUMSUB', key)[2] > 0 then return true end
    local _, _, gone = last(key)
    return gone and not is_last_resort
end
-- Look at a stream of which the accounts know no use since 'score': it goes, unless there was one. What is viewed, or
-- says that its thread is gone, goes behind all others; where it stands there already, so do all that are left, and it
-- loses the older half of its events: its viewers have them, and who comes back for them gets a snapshot. What says that
-- a thread is gone has no such half, and goes then.
local function visit(key, score, ttl)
    local _, used = accounts(key)
    local at, left = math.floor(now() / 1000), redis.call('PTTL', key)
    local last_used, is_last_resort = at - ttl + left, score > at
    if left > 0 and last_used > score then
        redis.call('ZADD', used, last_used, key)
    elseif left > 0 and is_kept(key, is_last_resort) then
        if is_last_resort then
            redis.call('XTRIM', key, 'MAXLEN', '=', math.ceil(redis.call('XLEN', key) / 2))
            redis.call('DEL', key .. ':past')
        end
        redis.call('ZADD', used, math.max(at + 10000, score + 1), key)
    else
        redis.call('DEL', key, key .. ':past')
    end
    measure(key)
end
-- Have all streams take at most so many bytes, by so many looks.
local function shed(prefix, most, ttl, looks)
    local sizes, used = accounts(prefix)
    while looks > 0 and tonumber(redis.call('HGET', sizes, '') or '0') > most do
        local found = redis.call('ZRANGEBYSCORE', used, '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
        if not found[1] then
            redis.call('DEL', sizes)
            return
        end
        visit(found[1], tonumber(found[2]), ttl)
        looks = looks - 1
    end
end
