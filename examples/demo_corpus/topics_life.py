"""Topic records of body, money, travel and animals, in the format of `topics`."""

LIFE = """
sleep better | sleeping better | a doctor; a sleep nurse
+ go to bed at the same hour [every night|each evening]
+ keep the bedroom [dark|quiet], cool and tidy
+ put screens away [an hour|two hours] before bed
+ drink no coffee after [lunch|noon]
+ read a few pages under a [soft|dim] lamp
- keep regular hours
- put screens away
- darken the bedroom
- skip late coffee
= the body likes [a rhythm|steady hours]
= morning light helps you sleep [at night|in the evening]
? the room heat; the pillow; the alarm
! late coffee; bright screens; long naps

start running | starting to run | a coach; a doctor
+ buy shoes that fit [well|your feet]
+ walk for [five|ten] minutes to warm up
+ run [one minute|two minutes], then walk one, for twenty minutes
+ rest a day between [runs|outings]
+ add a little distance [each week|every week]
- wear good shoes
- warm up by walking
- run slowly, walk often
- rest between runs
= slow running builds [stamina|the heart]
= you should be able to talk [as you run|while you run]
? the shoes; the knees; the weather
! sore knees; blisters; a pulled muscle

learn to swim | learning to swim | a swimming teacher; a lifeguard
+ begin in [shallow|warm] water where you can stand
+ breathe out [slowly|gently] under the water
+ float on your back with [relaxed|open] arms
+ kick from the hips while you hold a [board|rail]
+ join the arm strokes and the kicks [last|at the end]
- start in shallow water
- breathe out under water
- float on your back
- kick from the hips
= [lungs full of air|full lungs] hold you up
= calm breathing matters more than [strength|speed]
? the depth; the lifeguard; the goggles
! deep water; cramp; swallowed water

ride a bike | riding a bike | a cyclist; a riding coach
+ set the saddle so that your toes [touch|reach] the ground
+ find a [flat|quiet] place without cars
+ push off with one foot and look [ahead|far ahead]
+ turn the handlebar [gently|a little] towards the side you lean to
+ brake with both hands, [rear wheel first|softly]
- set the saddle low
- look far ahead
- push off and pedal
- brake with both hands
= speed keeps a bike [upright|steady]
= eyes lead and the bike [follows|goes along]
? the brakes; the helmet; the tyres
! scraped knees; loose gravel; fast cars

fix a flat tyre | fixing a flat tyre | a bike mechanic; a cyclist
+ take the wheel off and let [the air|all air] out
+ lift the tyre over the rim with [two levers|plastic levers]
+ pump the tube and listen for the [hiss|leak]
+ roughen the spot and press on a [patch|glued patch]
+ feel inside the tyre for [glass|thorns]
- take the wheel off
- find the hole
- press on a patch
- pump it up hard
= water shows a [small|hidden] hole by its bubbles
= glue needs [three|five] minutes to get tacky
? the tyre wall; the valve; the brakes
! a pinched tube; a hidden thorn; a loose wheel

make a budget | making a budget | a bank clerk; an accountant
+ write down [every|each] expense for a month
+ sort the expenses into [needs and wants|three groups]
+ set a [weekly|monthly] limit for each group
+ move a [tenth|part] of your pay to savings on payday
+ go over the figures [every Sunday|once a month]
- write down expenses
- set weekly limits
- save on payday
- sort needs from wants
= small costs add up [quickly|faster than rent]
= savings grow best when they are [automatic|put away first]
? the bills; the sums; the bank fees
! forgotten bills; debt; late fees

save money | saving money | a bank adviser; an accountant
+ cook at home [four|five] days a week
+ cancel the [plans|subscriptions] that you no longer use
+ wait [a day|three days] before you buy anything big
+ compare the [prices|offers] of two shops
+ put spare coins into a [jar|separate account]
- cook at home
- cancel unused plans
- wait before buying
- compare prices
= habits save more than [sales|coupons]
= an empty list makes a full [basket|cart]
? the contract; the receipt; the fees
! hidden fees; cheap rubbish; impulse buys

pack a suitcase | packing a suitcase | a travel agent; a flight attendant
+ make a list [two days|a day] before you leave
+ roll the [shirts|clothes] instead of folding them
+ put heavy things near the [wheels|bottom]
+ fill the shoes with [socks|small things]
+ keep papers and medicine in your [hand bag|small bag]
- make a list
- roll the clothes
- put heavy things low
- stuff socks in shoes
= rolled clothes crease [less|little]
= most people use half of what they [pack|carry]
? the weight limit; the passport; the zips
! a burst zip; leaking bottles; a lost ticket

plan a trip | planning a trip | a travel agent; a guide
+ choose the [dates|season] before the place
+ set a [budget|limit] for beds, food and trains
+ book the [first night|train] early
+ mark [three|four] sights on a map and leave gaps
+ copy the [tickets|papers] and keep them apart
- choose the dates
- book the first night
- mark the sights
- copy your papers
= trains are [cheaper|often cheaper] when booked early
= a free afternoon is often the best part of a [trip|journey]
? the visa; the weather; the timetable
! missed trains; full hotels; bad weather

tie a knot | tying a knot | a sailor; a climber
+ make a small loop in the [rope|line]
+ pass the end up through the loop and [round the back|behind the rope]
+ bring the end back [down|through] the same loop
+ hold the end and pull the long part [tight|slowly]
+ leave a tail as long as your [hand|thumb]
- make a small loop
- pass the end through
- pull it tight
- leave a long tail
= a good knot holds and still [opens|comes undone]
= wet rope grips [harder|more] than dry rope
? the rope; the tail; the load
! slipping; a frayed rope; a rope burn

care for a cat | caring for a cat | a vet; a cat breeder
+ give the cat [fresh|clean] water every day
+ feed it [small meals|wet food] twice a day
+ clean the [box|litter] each morning
+ play with a [string|feather] for ten minutes
+ let it come to you and [scratch its chin|blink slowly]
- give fresh water
- clean the box daily
- play every day
- let it come
= cats like [high|warm] places to sleep
= a slow blink means [trust|peace] to a cat
? the food; the windows; the claws
! fleas; scratches; toxic lilies

train a dog | training a dog | a dog trainer; a vet
+ use one [short|clear] word for each command
+ reward the dog at once with a [treat|bit of cheese]
+ practise for [five|ten] minutes, twice a day
+ start in a [quiet|small] room, then go outside
+ end each lesson with [a game|something easy]
- use short commands
- reward it at once
- practise daily
- end with play
= dogs learn from what happens [at once|next]
= tired dogs learn [little|slowly]
? the lead; the collar; the treats
! biting; running off; mixed signals

keep fish | keeping fish | a pet shop owner; a vet
+ run the filter for [two|three] weeks before you add fish
+ choose a tank that holds [sixty|eighty] litres or more
+ change a [quarter|fifth] of the water each week
+ feed a [pinch|little] once a day
+ add [plants|stones] so that the fish can hide
- run the filter first
- change water weekly
- feed a small pinch
- add some plants
= big tanks are [easier|steadier] than small ones
= fish need [clean water|space] more than food
? the water heat; the filter; the pump
! cloudy water; green slime; hungry cats
"""
